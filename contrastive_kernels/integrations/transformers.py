"""transformers' ``CLIPModel`` and ``SiglipModel``, whose loss has no matrix of logits; so has a Trainer's step then."""

from __future__ import annotations

from contextlib import AbstractContextManager
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


class CLIPModel(_clip.CLIPModel):
    """transformers' ``CLIPModel``: with ``return_loss=True`` it gives the loss and the embeddings, and no logits.

    Parameters
    ----------
    config : CLIPConfig
        As in transformers; ``from_pretrained`` too.

    Notes
    -----
    Without ``return_loss`` it is transformers' own. As there, the loss is of this process's batch.
    """

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
        """Matching texts and pictures; a ``CLIPOutput``."""
        if not return_loss:
            given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(
                input_ids, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **given, **kwargs
            )
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.get_text_features(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        image_embeds, text_embeds = _unit(vision.pooler_output), _unit(text.pooler_output)
        scale = self.logit_scale.exp().to(text_embeds.device)
        loss = clip_loss(text_embeds, image_embeds.to(text_embeds.device), scale)
        return _output(_clip.CLIPOutput, loss, text_embeds, image_embeds, text, vision)


class SiglipModel(_siglip.SiglipModel):
    """transformers' ``SiglipModel``: with ``return_loss=True`` it gives the loss and the embeddings, and no logits.

    Parameters
    ----------
    config : SiglipConfig
        As in transformers; ``from_pretrained`` too.

    Notes
    -----
    Without ``return_loss`` it is transformers' own. As there, the loss is of this process's batch.
    """

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
        """Matching texts and pictures; a ``SiglipOutput``."""
        if not return_loss:
            given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
            return super().forward(
                input_ids, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **given, **kwargs
            )
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.text_model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        image_embeds, text_embeds = _unit(vision.pooler_output), _unit(text.pooler_output)
        device = text_embeds.device
        scale, bias = self.logit_scale.exp().to(device), self.logit_bias.to(device)
        loss = sigmoid(text_embeds, image_embeds.to(device), scale, bias)
        return _output(_siglip.SiglipOutput, loss, text_embeds, image_embeds, text, vision)


def _unit(features: Tensor) -> Tensor:
    """Rows [n, D] over their norms, as transformers takes them."""
    return features / features.norm(dim=-1, keepdim=True)


def _output(kind: Any, loss: Tensor, text_embeds: Tensor, image_embeds: Tensor, text: Any, vision: Any) -> Any:
    """An output without logits."""
    return kind(
        loss=loss, text_embeds=text_embeds, image_embeds=image_embeds, text_model_output=text,
        vision_model_output=vision,
    )  # fmt: skip


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
