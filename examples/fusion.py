"""ALBEF's recipe, small: image patches, a text transformer, and a transformer that reads the text with the picture.

Three objectives: image-text contrast with momentum features and a queue; image-text matching, whose negatives the
contrastive softmax itself draws (``contrastive_kernels.sample_negatives``); words masked in the caption. The
regularisers of latent structure act on the contrastive features, as in the two towers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from glyphs import Batch, GlyphData
from options import COUNT, FRACTION, SIZE, Number
from structured_towers import STRUCTURE, Momentum, statistics_kept
from tasks import question_words
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from towers import ImageTower, TwoTowers, prepare_images
from train_clip import Settings, Trainer
from transformer import LEAST, MASK, START, Layer, TextTransformer, Vocabulary, Words
from views import all_faces

import contrastive_kernels as ck

__all__ = ["FusionModel", "FusionSettings", "FusionTrainer", "Queue"]

PATCHES = 16  # 4 x 4 of 8 x 8 pixels


@dataclasses.dataclass(frozen=True)
class FusionSettings(Settings):
    """What decides a run of the fusion model, beside what decides any run."""

    batch: int = 192
    steps: int = 250
    dim: int = 64  # of the contrastive features
    width: int = 96  # of the transformers
    text_layers: int = 2
    fusion_layers: int = 2
    lr: float = 2e-3
    weight_decay: float = 0.05
    shift: int = 2
    momentum: float = 0.9  # a short training: slower keys are of another model than the queries
    queue: int = 1536
    masked: float = 0.3  # share of the caption's tokens; captions are short
    separation: float = 0.0
    bridge: float = 0.0
    geometry: float = 0.0

    numbers: ClassVar[Mapping[str, Number]] = {
        **Settings.numbers, "width": SIZE, "text_layers": COUNT, "fusion_layers": COUNT, "queue": SIZE,
        "masked": FRACTION, **STRUCTURE,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < self.batch:
            raise ValueError(f"queue: expected at least a batch of {self.batch} rows, got {self.queue}")


class FusionModel(TwoTowers):
    """Patches and words, each by itself and then together.

    Parameters
    ----------
    vocabulary : Vocabulary
    settings : FusionSettings
    """

    def __init__(self, vocabulary: Vocabulary, settings: FusionSettings) -> None:
        nn.Module.__init__(self)  # TwoTowers' encoders give one vector each; these give patches and words
        width, dim = settings.width, settings.dim
        self.vocabulary = vocabulary
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(0.0))
        self.patches = ImageTower(1).convolutions  # [N, 4, 16, 16] -> [N, 64, 4, 4]
        self.patch_in = nn.Linear(64, width)
        self.position = nn.Parameter(torch.randn(PATCHES, width) * 0.02)
        self.look = Layer(width)
        self.words = TextTransformer(len(vocabulary), width, settings.text_layers)
        self.fusion = nn.ModuleList(Layer(width, cross=True) for _ in range(settings.fusion_layers))
        widths = {
            "image": PATCHES * width,
            "text": width,
        }  # all patches, where each stands: their mean learns far slower
        self.shared = nn.ModuleDict(
            {side: nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, dim)) for side, wide in widths.items()}
        )
        self.norm = nn.LayerNorm(width)
        self.matching = nn.Linear(width, 2)
        self.mask_bias = nn.Parameter(torch.zeros(len(vocabulary)))
        # last, so that the variants of a seed start from the same weights
        heads = {side: ck.SeparationHead(wide, dim, width) for side, wide in widths.items()}
        self.independent = nn.ModuleDict(heads if settings.separation else {})

    def prepare_captions(self, texts: Any) -> Words:
        """Texts as tokens."""
        return Words(texts, self.vocabulary, self.log_logit_scale.device)

    def see(self, images: Tensor) -> Tensor:
        """Pictures uint8 [N, 32, 32] -> patches [N, 16, W]."""
        patches = self.patches(prepare_images(images)).flatten(2).transpose(1, 2)
        return self.look(self.patch_in(patches) + self.position, None)

    def fuse(self, words: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """Words' states [N, L, W] read with patches [N, K, W] -> [N, L, W]."""
        for layer in self.fusion:
            words = layer(words, mask, patches)
        return self.norm(words)

    def image_features(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shared and independent unit features [N, D] of pictures' patches [N, 16, W]."""
        return self._project(patches.flatten(1), "image")

    def text_features(self, words: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shared and independent unit features [N, D] of texts' states [N, L, W]: of their first."""
        return self._project(words[:, 0], "text")

    def _project(self, state: Tensor, side: str) -> tuple[Tensor, Tensor | None]:
        independent = self.independent[side](state) if self.independent else None
        return normalize(self.shared[side](state), dim=1), independent

    def encode_images(self, images: Tensor) -> Tensor:
        """Shared unit features [N, D]."""
        return self.image_features(self.see(images))[0]

    def encode_captions(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Shared unit features [N, D]."""
        return self.text_features(self.words(captions[0])[0])[0]

    def guess_words(self, states: Tensor) -> Tensor:
        """Logits over the vocabulary [..., V] of states [..., W]."""
        return states @ self.words.embedding.weight.T + self.mask_bias


class Queue:
    """The latest momentum features of both modalities: more candidates for the contrast than a batch has.

    Parameters
    ----------
    size : int
        Rows.
    dim : int
    device : torch.device
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.features = torch.zeros(2, size, dim, device=device)  # images, texts
        self.characters = torch.full((size,), -1, device=device)
        self.filled = 0
        self._next = 0

    def push(self, image: Tensor, text: Tensor, characters: Tensor) -> None:
        """Replaces the oldest rows by a batch's [N, D]."""
        size = self.features.shape[1]
        rows = (torch.arange(len(image), device=image.device) + self._next) % size
        self.features[:, rows] = torch.stack([image, text])
        self.characters[rows] = characters
        self._next = (self._next + len(image)) % size
        self.filled = min(size, self.filled + len(image))

    def beside(self, own: Tensor, modality: int, characters: Tensor) -> Tensor:
        """Candidates [N + Q, D]: a batch's own, then those queued features that belong to none of its characters."""
        keep = ~torch.isin(self.characters[: self.filled], characters)
        return torch.cat([own, self.features[modality, : self.filled][keep]])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"features": self.features, "characters": self.characters, "place": (self.filled, self._next)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.features.copy_(state["features"])
        self.characters.copy_(state["characters"])
        self.filled, self._next = state["place"]


class _FusionState:
    """Momentum model and queue, and the contrast with them: the base loss that the regularisers are added to."""

    def __init__(self, momentum: Momentum[FusionModel], queue: Queue) -> None:
        self.momentum, self.queue = momentum, queue
        self.keys: tuple[Tensor, Tensor] | None = None  # this step's candidates of both modalities

    def contrast(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        """Four InfoNCE terms, two across and two within the modalities, against momentum features and the queue."""
        if self.keys is None:
            raise TypeError("keys: expected the step's candidates; got None")
        images, texts = self.keys
        pairs = ((image, texts), (text, images), (image, images), (text, texts))
        return torch.stack([ck.info_nce(x, keys, logit_scale) for x, keys in pairs]).mean()

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """The fusion model needs more than two features: ``FusionTrainer`` computes the loss."""
        raise TypeError("expected a call of FusionTrainer.train_step")

    def state_dict(self) -> dict[str, Any]:
        """Both."""
        return {"momentum": self.momentum.model.state_dict(), "queue": self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes both back."""
        self.momentum.model.load_state_dict(state["momentum"])
        self.queue.load_state_dict(state["queue"])


class FusionTrainer(Trainer):
    """Pre-training of the fusion model with any of the regularisers."""

    views = 2
    model: FusionModel
    settings: FusionSettings
    objective: _FusionState

    def __init__(self, settings: FusionSettings, data: GlyphData, device: torch.device | str = "cpu") -> None:
        super().__init__(settings, data, device)
        torch.manual_seed(settings.seed)  # again: the same words masked, whatever heads there are
        self.loss = ck.LatentStructureLoss(self.objective.contrast, bridge=settings.bridge, geometry=settings.geometry)
        self.terms: dict[str, float] = {}

    def _make_model(self) -> FusionModel:
        training = [self.data.captions[c] for c in self.data.characters("train")]
        # the questions' words have their tokens beforehand, as a pre-trained text encoder has them
        return FusionModel(Vocabulary(training + LEAST * question_words()), self.settings)

    def _groups(self) -> list[dict[str, Any]]:
        """The temperature learns as fast as the rest: much faster, it runs away from transformers that learn slowly."""
        groups = super()._groups()
        return [{**group, "speed": 1.0} for group in groups]

    def _make_objective(self) -> _FusionState:
        queue = Queue(self.settings.queue, self.settings.dim, self.device)
        return _FusionState(Momentum(self.model, self.settings.momentum), queue)

    def _loss(self) -> Tensor:
        """Contrast and regularisers, matching, masked words: their sum."""
        batch = self.sampler[self.step]
        characters = torch.from_numpy(batch.characters).to(self.device)
        images = torch.from_numpy(batch.images[0]).to(self.device)
        tokens, _ = self.captions[characters]
        patches, (words, mask) = self.model.see(images), self.model.words(tokens)
        image, _ = self.model.image_features(patches)
        text, text_independent = self.model.text_features(words)
        views = self._momentum_views(batch, tokens, characters)
        result = self.loss(image, text, self.model.logit_scale, image_aug=views["image"], text_aug=views["text"])
        self.objective.queue.push(views["image"], views["text"], characters)
        matching = self._matching(image, text, patches, words, mask)
        masked = self._masked_words(tokens, patches)
        parts = {**result, "matching": matching, "masked words": masked}
        loss = result["loss"] + matching + masked
        if text_independent is not None:
            parts["separation"] = self._separation(batch, text, text_independent, views["text_independent"])
            loss = loss + self.settings.separation * parts["separation"]
        self.terms = {name: float(value.detach()) for name, value in parts.items()}
        return loss

    @torch.no_grad()
    def _momentum_views(self, batch: Batch, tokens: Tensor, characters: Tensor) -> dict[str, Tensor]:
        """The slow model's features of another view; sets the contrast's candidates."""
        state, model = self.objective, self.objective.momentum.model
        state.momentum.follow(self.model)
        second = torch.from_numpy(batch.images[1]).to(self.device)
        image, _ = model.image_features(model.see(second))
        text, independent = model.text_features(model.words(tokens)[0])
        state.keys = (state.queue.beside(image, 0, characters), state.queue.beside(text, 1, characters))
        views = {"image": image, "text": text}
        return views if independent is None else {**views, "text_independent": independent}

    def _separation(self, batch: Batch, text: Tensor, independent: Tensor, independent_aug: Tensor) -> Tensor:
        """Feature separation, as ``TowerTrainer`` does it: pictures of fewer characters in all their faces."""
        settings, slow = self.settings, self.objective.momentum.model
        pictures, moved = all_faces(self.data, batch.characters, len(text), self.step, settings.seed, settings.shift)
        with statistics_kept(self.model), statistics_kept(slow):
            shared, image_independent = self.model.image_features(self.model.see(pictures.to(self.device)))
            with torch.no_grad():
                _, image_independent_aug = slow.image_features(slow.see(moved.to(self.device)))
        if image_independent is None:
            raise TypeError("separation: expected a model with heads for independent features")
        found = ck.feature_separation(
            shared, text, image_independent, independent, image_independent_aug, independent_aug,
            self.model.logit_scale.detach(),
        )  # fmt: skip
        return cast("Tensor", found)

    def _matching(self, image: Tensor, text: Tensor, patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Does the caption belong to the picture? Each has its own and a hard negative: drawn by the contrast."""
        scale = self.model.logit_scale.detach()
        # detach: which negatives are drawn is no function of the parameters that could be differentiated
        wrong_text = ck.sample_negatives(image.detach(), text.detach(), scale)
        wrong_image = ck.sample_negatives(text.detach(), image.detach(), scale)
        fused = self.model.fuse(
            torch.cat([words, words[wrong_text], words]), torch.cat([mask, mask[wrong_text], mask]),
            torch.cat([patches, patches, patches[wrong_image]]),
        )  # fmt: skip
        truth = torch.zeros(len(fused), dtype=torch.int64, device=fused.device)
        truth[: len(words)] = 1
        return cross_entropy(self.model.matching(fused[:, 0]), truth)

    def _masked_words(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Which tokens were masked? The picture helps."""
        masked = (torch.rand(tokens.shape, device=tokens.device) < self.settings.masked) & (tokens > START)
        masked[:, 1] |= ~masked.any(1)  # at least one of each caption
        words, mask = self.model.words(tokens.masked_fill(masked, MASK))
        return cross_entropy(self.model.guess_words(self.model.fuse(words, mask, patches)[masked]), tokens[masked])
