"""The regularisers of latent structure over the ranks of a group against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

NAMES = (
    "image", "text", "image_aug", "text_aug", "image_independent", "text_independent", "image_independent_aug",
    "text_independent_aug",
)  # fmt: skip
D = 6


def features(n: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(n)
    made = [torch.randn(n, D, generator=g, dtype=torch.float64) for _ in NAMES]
    return {name: torch.nn.functional.normalize(v, dim=1) for name, v in zip(NAMES, made)}


def separation(f: dict[str, Tensor], scale: Tensor, **over: Any) -> Tensor:
    return ck.feature_separation(
        *(f[name] for name in (NAMES[0], NAMES[1], *NAMES[4:])), scale, orthogonality=0.5, uniformity=2.0, **over
    )


def multimodal(f: dict[str, Tensor], scale: Tensor, **over: Any) -> Tensor:
    return ck.multimodal_contrastive(*(f[name] for name in NAMES[:4]), scale, **over)


def geometry(f: dict[str, Tensor], scale: Tensor, **over: Any) -> Tensor:
    over.pop("strategy", None)
    return scale * ck.geometric_consistency(*(f[name] for name in NAMES[:4]), cross=0.7, **over)


def whole(f: dict[str, Tensor], scale: Tensor, **over: Any) -> Tensor:
    """The module, which has the bridge too."""
    loss = ck.LatentStructureLoss(separation=0.3, bridge=0.2, geometry=0.25, **{"group": None, **over})
    given = {name: f[name] for name in NAMES[2:]}
    return loss(f["image"], f["text"], scale, **given, independent_logit_scale=scale)["loss"]


LOSSES = {"separation": separation, "multimodal": multimodal, "geometry": geometry, "whole": whole}


def outcome(loss: str, f: dict[str, Tensor], **over: Any) -> list[Tensor]:
    """Value and gradients of features and scale."""
    leaves = {name: v.clone().requires_grad_() for name, v in f.items()}
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    value = LOSSES[loss](leaves, scale, **over)
    (2.5 * value).backward()
    return [value.detach(), scale.grad, *(v.grad for v in leaves.values())]


def on_ranks(sizes: list[int], gradients: str, strategy: str) -> list[list[Tensor]]:
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    own = {name: v[start : start + sizes[rank]] for name, v in features(sum(sizes)).items()}
    over = {"group": "world", "gradients": gradients, "strategy": strategy, "uneven": True}
    return [outcome(loss, own, **over) for loss in LOSSES]


@pytest.mark.parametrize("gradients, strategy", [("average", "grid"), ("sum", "ring"), ("average", "replicated")])
@pytest.mark.parametrize("sizes", [[4, 4], [5, 0, 2], [1, 0], [0, 0]], ids=str)
def test_structure(sizes, gradients, strategy, tmp_path):
    found = succeeded(run(len(sizes), on_ranks, tmp_path, sizes, gradients, strategy))
    times = len(sizes) if gradients == "average" else 1
    for i, loss in enumerate(LOSSES):
        value, dscale, *others = outcome(loss, features(sum(sizes)))
        for one in found:
            torch.testing.assert_close(
                one[i][0], value, rtol=1e-12, atol=1e-12, msg=lambda m, loss=loss: f"{loss}: {m}"
            )
        shares = [one[i][1] for one in found]
        if loss in (
            "geometry",
        ):  # the scale lies outside the sum over ranks: a rank's own derivative, as with any loss
            shares = [share * times / len(sizes) for share in shares]
        torch.testing.assert_close(torch.stack(shares).sum(0) / times, dscale, rtol=1e-10, atol=1e-10)
        for k, wanted in enumerate(others):
            parts = [one[i][2 + k] for one in found]
            if wanted is None:
                assert all(part is None for part in parts)
            else:
                torch.testing.assert_close(torch.cat(parts) / times, wanted, rtol=1e-9, atol=1e-11)
