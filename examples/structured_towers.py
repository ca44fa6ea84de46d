"""Two towers with latent structure: shared and independent features, augmented views, regularisers, momentum towers."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from glyphs import Batch, GlyphData
from options import NOT_NEGATIVE, SHARE, SIZE, Number
from torch import Tensor, nn
from torch.nn.functional import normalize
from towers import Captions, CaptionSet, TwoTowers, prepare_images
from train_clip import Settings, Trainer
from transformer import Vocabulary, Words, WordTower
from views import CaptionViews, all_faces

import contrastive_kernels as ck

__all__ = ["VARIANTS", "Momentum", "Structure", "StructuredTowers", "TowerSettings", "TowerTrainer", "structure_of"]

TEXTS = ("ngrams", "transformer")


@dataclasses.dataclass(frozen=True)
class Structure:
    """Weights of the three regularisers; 0 leaves one out."""

    separation: float = 0.0
    bridge: float = 0.0
    geometry: float = 0.0


# The paper prints no weights. These are first guesses: docs/structures_experiment.md has what they do.
SEPARATION, BRIDGE, GEOMETRY = 0.3, 0.1, 0.02
VARIANTS: dict[str, Structure] = {
    "base": Structure(),
    "+ separation": Structure(separation=SEPARATION),
    "+ bridge": Structure(bridge=BRIDGE),
    "+ geometry": Structure(geometry=GEOMETRY),
    "+ all": Structure(SEPARATION, BRIDGE, GEOMETRY),
}


def structure_of(variant: str) -> Structure:
    """The weights of a variant: one of ``VARIANTS``, or written out.

    Examples
    --------
    >>> structure_of("separation=0.1 bridge=2")
    Structure(separation=0.1, bridge=2.0, geometry=0.0)
    """
    if variant in VARIANTS:
        return VARIANTS[variant]
    weights = dict(part.partition("=")[::2] for part in variant.split())
    names = [field.name for field in dataclasses.fields(Structure)]
    try:
        if not weights or not weights.keys() <= set(names):
            raise ValueError
        return Structure(**{name: float(NOT_NEGATIVE(weight)) for name, weight in weights.items()})
    except (ValueError, argparse.ArgumentTypeError):
        expected = f"one of {list(VARIANTS)} or weights of {names}, at least 0, as in 'separation=0.1 bridge=2'"
        raise ValueError(f"variant: expected {expected}, got {variant!r}") from None


#: What both models' settings have of it.
STRUCTURE: Mapping[str, Number] = {
    "momentum": SHARE, "separation": NOT_NEGATIVE, "bridge": NOT_NEGATIVE, "geometry": NOT_NEGATIVE
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TowerSettings(Settings):
    """What decides a run of the two towers, beside what decides any run."""

    batch: int = 1024
    steps: int = 200
    dim: int = 128  # of shared and of independent features
    hidden: int = 256  # of what both are projected from
    lr: float = 3e-3
    weight_decay: float = 0.2
    shift: int = 2
    text: str = "ngrams"
    drop: float = 0.2  # share of the words that a caption's view loses
    momentum: float = 0.0  # of the towers that encode the views; 0: the towers themselves do
    separation: float = 0.0
    bridge: float = 0.0
    geometry: float = 0.0

    numbers: ClassVar[Mapping[str, Number]] = {**Settings.numbers, "hidden": SIZE, "drop": SHARE, **STRUCTURE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text not in TEXTS:
            raise ValueError(f"text: expected one of {TEXTS}, got {self.text!r}")


class StructuredTowers(TwoTowers):
    """Two towers; each ends in a projection to the shared space and, if wanted, in one to independent features.

    Parameters
    ----------
    dim : int
        Width of shared and independent features.
    hidden : int
        Width of the towers' own results.
    separation : bool
        Whether there are heads for independent features.
    vocabulary : Vocabulary, optional
        Makes the text tower a transformer over words; without one it is the sum of hashed n-grams.
    """

    def __init__(self, dim: int, hidden: int, separation: bool, vocabulary: Vocabulary | None = None) -> None:
        super().__init__(hidden)
        self.vocabulary = vocabulary
        if vocabulary is not None:
            self.text = WordTower(vocabulary, hidden)  # type: ignore[assignment]
        self.shared = nn.ModuleDict({side: nn.Sequential(nn.GELU(), nn.Linear(hidden, dim)) for side in SIDES})
        widths = {"image": self.image.features, "text": hidden}
        heads = {side: ck.SeparationHead(widths[side], dim, 2 * hidden) for side in SIDES} if separation else {}
        self.independent = nn.ModuleDict(heads)

    def prepare_captions(self, texts: Sequence[str]) -> CaptionSet:
        """Texts as ``encode_captions`` takes them."""
        device = self.log_logit_scale.device
        return Captions(texts, device) if self.vocabulary is None else Words(texts, self.vocabulary, device)

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shared and independent unit features [N, D] of pictures uint8 [N, 32, 32]."""
        seen = self.image.convolutions(prepare_images(images)).flatten(1)
        return self._project(self.image.head(seen), seen, "image")

    def text_features(self, captions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Shared and independent unit features [N, D] of captions."""
        hidden = self.text(captions)
        return self._project(hidden, hidden, "text")

    def _project(self, hidden: Tensor, earlier: Tensor, side: str) -> tuple[Tensor, Tensor | None]:
        """Shared features from a tower's end, independent ones from ``earlier``: its end forgets the face."""
        shared = normalize(self.shared[side](hidden), dim=1)
        return shared, self.independent[side](earlier) if self.independent else None

    def encode_images(self, images: Tensor) -> Tensor:
        """Shared unit features [N, D]."""
        return self.image_features(images)[0]

    def encode_captions(self, captions: tuple[Tensor, Tensor]) -> Tensor:
        """Shared unit features [N, D]."""
        return self.text_features(captions)[0]


SIDES = ("image", "text")


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch, as ever in training, that leaves no trace in the running means.

    For pictures of another kind than those that will be asked about: parts, here.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum


Model = TypeVar("Model", bound=nn.Module)


class Momentum(Generic[Model]):
    """A copy of a model that follows it slowly and is never trained.

    Parameters
    ----------
    model : nn.Module
    rate : float
        Share of the copy that stays at every step.
    """

    def __init__(self, model: Model, rate: float) -> None:
        self.rate = rate
        self.model: Model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """One step towards ``model``; its buffers (running means) are taken over as they are."""
        for parameter, newer in zip(self.model.parameters(), model.parameters()):
            parameter.lerp_(newer, 1 - self.rate)
        for buffer, newest in zip(self.model.buffers(), model.buffers()):
            buffer.copy_(newest)


class _TowerState:
    """What a checkpoint keeps beside the model: the momentum towers, if there are any."""

    def __init__(self, momentum: Momentum[StructuredTowers] | None) -> None:
        self.momentum = momentum

    def __call__(self, model: TwoTowers, image: Tensor, text: Tensor, characters: Tensor) -> Tensor:
        """Two views of each modality are needed here: ``TowerTrainer`` computes the loss."""
        raise TypeError("expected a call of TowerTrainer.train_step")

    def state_dict(self) -> dict[str, Any]:
        """The momentum towers' parameters."""
        return self.momentum.model.state_dict() if self.momentum else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        if self.momentum:
            self.momentum.model.load_state_dict(state)


class TowerTrainer(Trainer):
    """One run of the two towers with any of the regularisers."""

    views = 2
    model: StructuredTowers
    settings: TowerSettings
    objective: _TowerState

    def __init__(self, settings: TowerSettings, data: GlyphData, device: torch.device | str = "cpu") -> None:
        super().__init__(settings, data, device)
        self.loss = ck.LatentStructureLoss(bridge=settings.bridge, geometry=settings.geometry)
        self.caption_views = CaptionViews(data.captions, self.model.prepare_captions, settings.drop, settings.seed)
        self.terms: dict[str, float] = {}

    def _make_model(self) -> StructuredTowers:
        training = [self.data.captions[c] for c in self.data.characters("train")]
        vocabulary = Vocabulary(training) if self.settings.text == "transformer" else None
        return StructuredTowers(self.settings.dim, self.settings.hidden, self.settings.separation > 0, vocabulary)

    def _make_objective(self) -> _TowerState:
        return _TowerState(Momentum(self.model, self.settings.momentum) if self.settings.momentum else None)

    def _loss(self) -> Tensor:
        """Features of two views of each modality, and the loss; separation adds its own pictures."""
        batch, momentum = self.sampler[self.step], self.objective.momentum
        characters = torch.from_numpy(batch.characters).to(self.device)
        first, second = (torch.from_numpy(images).to(self.device) for images in batch.images)
        image, _ = self.model.image_features(first)
        text, text_independent = self.model.text_features(self.captions[characters])
        if momentum:
            momentum.follow(self.model)
        views = momentum.model if momentum else self.model
        with torch.set_grad_enabled(momentum is None):
            image_aug = views.encode_images(second)
            text_aug, text_independent_aug = views.text_features(self.caption_views.view(characters, self.step))
        scale = self.model.logit_scale
        result = self.loss(image, text, scale, image_aug=image_aug, text_aug=text_aug)
        self.terms = {name: float(value.detach()) for name, value in result.items()}
        if text_independent is None:
            return result["loss"]
        separation, terms = self._separation(batch, views, text, text_independent, text_independent_aug)
        self.terms |= {"separation": float(separation.detach()), **{name: float(v) for name, v in terms.items()}}
        return result["loss"] + self.settings.separation * separation

    def _separation(
        self, batch: Batch, views: StructuredTowers, text: Tensor, independent: Tensor, independent_aug: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Feature separation: the text's features as they are, the pictures' of fewer characters in all their faces."""
        settings, rows = self.settings, len(text)
        pictures, moved = all_faces(self.data, batch.characters, rows, self.step, settings.seed, settings.shift)
        with statistics_kept(self.model), statistics_kept(views):
            shared, image_independent = self.model.image_features(pictures.to(self.device))
            with torch.set_grad_enabled(views is self.model):
                _, image_independent_aug = views.image_features(moved.to(self.device))
        if image_independent is None:
            raise TypeError("separation: expected towers with heads for independent features")
        found = ck.feature_separation(
            shared, text, image_independent, independent, image_independent_aug, independent_aug,
            self.model.logit_scale.detach(), return_terms=True,
        )  # fmt: skip
        return cast("tuple[Tensor, dict[str, Tensor]]", found)
