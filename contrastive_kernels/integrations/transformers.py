"""transformers' ``CLIPModel`` and ``SiglipModel``, whose loss has no matrix of logits; so has a Trainer's step then."""

from __future__ import annotations

from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

from torch import Tensor

from ..losses import clip_loss, sigmoid
from .common import missing, replace, replaced

try:
    from transformers.models.clip import modeling_clip as _clip
    from transformers.models.siglip import modeling_siglip as _siglip
    from transformers.utils import can_return_tuple
except ImportError as _error:
    raise missing(__name__, "transformers", _error) from _error

__all__ = ["CLIPModel", "SiglipModel", "install", "patched"]


class _WithoutLogits:
    """What both models share: features of matching texts and pictures, and the loss of them."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not as transformers' own models are not, whose weights it initialises and converts by rules of its own."""
        custom: bool = super().is_custom_code() and cls.__module__ != __name__  # type: ignore[misc]
        return custom

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Matching texts and pictures; the model's output."""
        of_text: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        of_vision: dict[str, Any] = {"interpolate_pos_encoding": interpolate_pos_encoding}
        model: Any = self
        if not return_loss:
            return super().forward(input_ids, pixel_values, **of_text, **of_vision, **kwargs)  # type: ignore[misc]
        see, read = model._towers()
        vision, text = see(pixel_values, **of_vision, **kwargs), read(input_ids, **of_text, **kwargs)
        image_embeds, text_embeds = (
            each.pooler_output / each.pooler_output.norm(dim=-1, keepdim=True) for each in (vision, text)
        )
        loss = model._contrast(text_embeds, image_embeds.to(text_embeds.device))
        return model._output(
            loss=loss, text_embeds=text_embeds, image_embeds=image_embeds, text_model_output=text,
            vision_model_output=vision,
        )  # fmt: skip


# what tools read: the same arguments, with the annotations that transformers' own have
_WithoutLogits.forward.__signature__ = signature(_clip.CLIPModel.forward)


class CLIPModel(_WithoutLogits, _clip.CLIPModel):
    """transformers' ``CLIPModel``: with ``return_loss=True`` it gives the loss and the embeddings, and no logits.

    Parameters
    ----------
    config : CLIPConfig
        As in transformers; ``from_pretrained`` too.

    Notes
    -----
    Without ``return_loss`` it is transformers' own. As there, the loss is of this process's batch.
    """

    _output = _clip.CLIPOutput

    def _towers(self) -> tuple[Any, Any]:
        return self.get_image_features, self.get_text_features

    def _contrast(self, text: Tensor, image: Tensor) -> Tensor:
        return clip_loss(text, image, self.logit_scale.exp().to(text.device))


class SiglipModel(_WithoutLogits, _siglip.SiglipModel):
    """transformers' ``SiglipModel``: with ``return_loss=True`` it gives the loss and the embeddings, and no logits.

    Parameters
    ----------
    config : SiglipConfig
        As in transformers; ``from_pretrained`` too.

    Notes
    -----
    Without ``return_loss`` it is transformers' own. As there, the loss is of this process's batch.
    """

    _output = _siglip.SiglipOutput

    def _towers(self) -> tuple[Any, Any]:
        return self.vision_model, self.text_model

    def _contrast(self, text: Tensor, image: Tensor) -> Tensor:
        scale, bias = self.logit_scale.exp().to(text.device), self.logit_bias.to(text.device)
        return sigmoid(text, image, scale, bias)


_CLASSES = {_clip.CLIPModel: CLIPModel, _siglip.SiglipModel: SiglipModel}


def install() -> None:
    """Puts these models into the place of transformers' own: ``AutoModel`` and ``from_pretrained`` make them.

    Call it before names are imported from transformers one by one.
    """
    replace("transformers", _CLASSES)


def patched() -> AbstractContextManager[None]:
    """The same until the end of a ``with`` block.

    Returns
    -------
    context manager
        Models that are made within it stay these.
    """
    return replaced("transformers", _CLASSES)
