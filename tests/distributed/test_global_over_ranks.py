"""Global contrastive losses on several ranks: values, gradients, memories and temperatures of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

SAMPLES, D, STEPS = 20, 6, 3
COSINE = {"gamma": 0.4, "gamma_schedule": "cosine", "gamma_decay_epochs": 2}
BOUNDS = {"temperature": 0.5, "temperature_bounds": (0.2, 0.9), "temperature_rate": 0.02, "rho": 1.0}
#: By name: the loss, and whether it is given a scale.
CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "SogCLR": (ck.SogCLRLoss, True, {"gamma": 0.4}),
    "FastCLIP v3": (ck.SogCLRLoss, True, {**COSINE, "rho": 2.0, "normalize": True}),
    "SogCLR, views": (ck.SogCLRLoss, True, {"towers": 1, "gamma": 0.4}),
    "SogCLR, views, learnt": (ck.SogCLRLoss, True, {**COSINE, "towers": 1, "rho": 2.0}),
    "SogCLR, ring": (ck.SogCLRLoss, True, {"gamma": 0.4, "strategy": "ring"}),
    "iSogCLR": (ck.ISogCLRLoss, False, {**BOUNDS, "gamma": 0.4}),
    "FastCLIP v2": (ck.ISogCLRLoss, False, {**BOUNDS, **COSINE, "temperature_betas": (0.9, 0.99)}),
    "iSogCLR, views": (ck.ISogCLRLoss, False, {**BOUNDS, "towers": 1, "gamma": 0.4, "strategy": "grid"}),
}


def batch(step: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, and samples that occur twice, on two ranks too; in the last step one sample alone."""
    g = torch.Generator().manual_seed(step)
    x, y = (0.5 * torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(2))
    index = torch.randint(SAMPLES, (n,), generator=g)
    return x, y, index if step < STEPS - 1 else index[:1].expand(n)


def train(name: str, sizes: list[int], rank: int | None, **over: Any) -> dict[str, Tensor]:
    """Some steps, of all rows or of one rank's: values, gradients, and what is remembered."""
    kind, scaled, options = CASES[name]
    loss, found = kind(SAMPLES, **(options | over)), {}
    for step in range(STEPS):
        loss.set_epoch(step)
        x, y, index = batch(step, sum(sizes))
        i = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        leaves = {"x": x[i].clone().requires_grad_(), "y": y[i].clone().requires_grad_()}
        if scaled:
            leaves["scale"] = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        a, b, *scale = leaves.values()
        value = loss(a, b, index[i], *scale)
        value.backward()
        found |= {f"{key} {step}": leaf.grad for key, leaf in leaves.items()} | {f"value {step}": value.detach()}
    state = {key: v.clone() for key, v in loss.state_dict().items() if isinstance(v, Tensor)}
    return found | {f"state {key}": v for key, v in state.items() if "running" not in key}


def on_ranks(sizes: list[int], gradients: str) -> list[dict[str, Tensor]]:
    over = {"gradients": gradients, "uneven": True}
    return [train(name, sizes, dist.get_rank(), **over) for name in CASES]


@pytest.mark.parametrize("sizes, gradients", [([4, 3], "average"), ([3, 0, 2, 3], "sum")], ids=str)
def test_the_training_of_one_process(sizes, gradients, tmp_path):
    results = succeeded(run(len(sizes), on_ranks, tmp_path, sizes, gradients))
    times = len(sizes) if gradients == "average" else 1
    for i, name in enumerate(CASES):
        parts = [each[i] for each in results]
        for key, want in train(name, sizes, None, group=False).items():
            mine = [part[key] for part in parts]
            if key[0] in "xy":
                got = torch.cat(mine) / times
            elif key.startswith("scale"):
                got = torch.stack(mine).sum(0) / times
            else:
                assert all(torch.equal(each, mine[0]) for each in mine), f"{name}: {key}"
                got = mine[0]
            torch.testing.assert_close(
                got, want, rtol=1e-6 if "temperature" in key else 1e-9, atol=1e-9, equal_nan=True,
                msg=lambda m, said=f"{name}, {key}": f"{said}: {m}",
            )  # fmt: skip


def mistaken() -> list[str]:
    """What the last rank does otherwise, or alone."""
    last, said = dist.get_rank() == 1, []
    x, y, index = batch(0, 4)

    def sogclr(scale: Any = 2.0, at: Tensor = index, train: bool = True, **options: Any) -> Any:
        loss = ck.SogCLRLoss(SAMPLES, **options)
        loss.set_epoch(int(last and "gamma_schedule" in options))
        return loss.train(train)(x, y, at, scale)

    mistakes: dict[str, Any] = {
        "rank 1 raised ValueError: index": lambda: sogclr(at=index + 99 * last),
        "rank 1 raised TypeError: index": lambda: sogclr(at=index.float() if last else index),
        "rank 1 raised ValueError: logit_scale": lambda: sogclr(torch.ones(3) if last else 2.0),
        "rho=2.0": lambda: sogclr(rho=2.0 if last else None),
        "towers=1": lambda: sogclr(towers=2 - last),
        "gamma=0.": lambda: sogclr(**COSINE),
        "training=False": lambda: sogclr(train=not last),
        "scale=2.5": lambda: sogclr(2.5 if last else 2.0),
        "uneven=True on rank 0": lambda: sogclr(uneven=not last),
        "SogCLRLoss": lambda: ck.ISogCLRLoss(SAMPLES)(x, y, index) if last else sogclr(),
        "(6.0, 0.05, ": lambda: ck.ISogCLRLoss(SAMPLES, temperature=0.05 if last else 0.01)(x, y, index),
        "(7.0, ": lambda: ck.ISogCLRLoss(SAMPLES, rho=6.0 + last)(x, y, index),
        "rank 1 raised ValueError: backend": lambda: sogclr(backend="cuda" if last else None),
    }  # fmt: skip
    for words, mistake in mistakes.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            mistake()
        assert words in str(caught.value), str(caught.value)
        said.append(str(caught.value))
    sogclr()  # the next call meets the others' next
    return said


def compiled() -> list[bool]:
    """Whether a loss under torch.compile, of whose graph it is a break, is the loss."""
    part, found = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4), []
    for compile_it in (False, True):
        (x, y, _), loss = batch(1, 8), ck.ISogCLRLoss(SAMPLES)
        x = x[part].clone().requires_grad_()
        value = (torch.compile(loss, backend="eager") if compile_it else loss)(x, y[part], torch.arange(8)[part])
        value.backward()
        found.append((value.detach(), x.grad, loss.memory.log_mean))
    return [torch.allclose(a, b) for a, b in zip(*found)]


def test_a_mistake_of_one_rank_is_an_error_on_all(tmp_path):
    one, other = succeeded(run(2, mistaken, tmp_path))
    assert one == other


def test_under_a_compiler(tmp_path):
    assert all(map(all, succeeded(run(2, compiled, tmp_path))))
