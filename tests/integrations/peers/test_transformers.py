"""transformers' CLIP and SigLIP with their own loss and with this: values, gradients, and what no longer is made."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
import vision  # noqa: F401  (before transformers)
from torch import Tensor
from transformers import CLIPConfig, SiglipConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.siglip.modeling_siglip import SiglipModel

from contrastive_kernels.integrations import common
from contrastive_kernels.integrations import transformers as ours

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
TEXT |= {"max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "projection_size": 16}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
KINDS = {"CLIPModel": (CLIPModel, CLIPConfig), "SiglipModel": (SiglipModel, SiglipConfig)}


def made(name: str, mine: bool, dtype: torch.dtype = torch.float64) -> Any:
    theirs, config = KINDS[name]
    torch.manual_seed(0)
    kind = getattr(ours, name) if mine else theirs
    return kind(config(text_config=TEXT, vision_config=VISION, projection_dim=12)).to(dtype)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_starts_as_transformers_own(name):
    """Where a checkpoint lacks weights, too; and tools see the same arguments."""
    theirs, mine = KINDS[name][0], getattr(ours, name)
    config = KINDS[name][1](text_config=TEXT, vision_config=VISION, projection_dim=12)
    states = []
    for kind in (theirs, mine):
        torch.manual_seed(0)
        states.append(kind.from_pretrained(None, config=config, state_dict={}).state_dict())
    assert states[0].keys() == states[1].keys()
    # transformers leaves CLIP's scale to what was in memory there
    known = [key for key in states[0] if (name, key) != ("CLIPModel", "logit_scale")]
    assert all(torch.equal(states[1][key], states[0][key]) for key in known)
    assert inspect.signature(mine.forward).parameters == inspect.signature(theirs.forward).parameters
    assert type("Own", (mine,), {}).is_custom_code(), "a user's subclass is"


def inputs(n: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (n, 6), generator=g)
    ids[:, -1] = 2
    pixels = torch.randn(n, 3, 8, 8, generator=g).to(dtype)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def step(model: Any, given: dict[str, Any]) -> list[Tensor]:
    out = model(**given, return_loss=True)
    out.loss.backward()
    return [out.loss.detach(), out.text_embeds, out.image_embeds, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [1, 9])
def test_value_and_gradients(name, n):
    found, wanted = (step(made(name, mine), inputs(n)) for mine in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_float32(name):
    given = inputs(9, torch.float32)
    truth = step(made(name, False, torch.float32).double(), {**given, "pixel_values": given["pixel_values"].double()})
    found, wanted = (step(made(name, mine, torch.float32), given) for mine in (True, False))
    ours_off, theirs_off = ([(v - t).abs().max() for v, t in zip(each, truth)] for each in (found, wanted))
    for mine, other, exact in zip(ours_off, theirs_off, truth):
        assert mine <= 2 * other + 32 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_outputs(name):
    """With a loss there are no logits; without it all is transformers'."""
    mine, theirs = made(name, True), made(name, False)
    given = inputs(4)
    assert mine(**given, return_loss=True).logits_per_image is None
    found, wanted = mine(**given), theirs(**given)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found.logits_per_image, wanted.logits_per_image)
    assert found.loss is None
    as_tuple = mine(**given, return_loss=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], theirs(**given, return_loss=True).loss)


@pytest.mark.parametrize("name", KINDS)
def test_from_pretrained(name, tmp_path):
    theirs = made(name, False, torch.float32)
    theirs.save_pretrained(tmp_path)
    mine = getattr(ours, name).from_pretrained(tmp_path)
    given = inputs(4, torch.float32)
    torch.testing.assert_close(mine(**given, return_loss=True).loss, theirs(**given, return_loss=True).loss)
    mine.save_pretrained(tmp_path / "again")
    KINDS[name][0].from_pretrained(tmp_path / "again")


def test_patched_and_install(tmp_path):
    transformers = sys.modules["transformers"]
    made("CLIPModel", False).save_pretrained(tmp_path)
    with ours.patched():
        assert transformers.CLIPModel is ours.CLIPModel
        assert type(transformers.AutoModel.from_pretrained(tmp_path)) is ours.CLIPModel
    assert transformers.CLIPModel is CLIPModel
    try:
        ours.install()
        assert transformers.SiglipModel is ours.SiglipModel
    finally:
        common.replace("transformers", {v: k for k, v in ours._CLASSES.items()})
    assert transformers.SiglipModel is SiglipModel
