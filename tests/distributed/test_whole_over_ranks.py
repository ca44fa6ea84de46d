"""Losses for which every rank computes all rows, and metrics, against one process: queues, labels, guides and so on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch import run, succeeded
from torch import Tensor
from torch import distributed as dist

import contrastive_kernels as ck

D = 6
SIZES = ([4, 3], [4, 0, 2, 3])


def drawn(n: int) -> dict[str, Tensor]:
    """A batch of rows, and what may be said of them."""
    g = torch.Generator().manual_seed(n)
    return {
        "x": torch.randn(n, D, generator=g, dtype=torch.float64),
        "y": torch.randn(n, D, generator=g, dtype=torch.float64),
        "bias": torch.randn(n, generator=g, dtype=torch.float64),
        "logits": torch.randn(n, generator=g, dtype=torch.float64),
        "weight": torch.rand(n, generator=g, dtype=torch.float64),
        "ids": torch.randint(4, (n,), generator=g),
        "labels": torch.randint(3, (n,), generator=g),
    }


def filled_queue() -> ck.FeatureQueue:
    queue = ck.FeatureQueue(8, D, ids=True, dtype=torch.float64)
    g = torch.Generator().manual_seed(9)
    queue.enqueue(torch.randn(5, D, generator=g, dtype=torch.float64), torch.randint(4, (5,), generator=g))
    return queue


def several(n: int, start: int = 0) -> Tensor:
    """Two positives of every row, of some the first alone, among columns that begin at `start`."""
    rows = torch.arange(n)
    other = torch.where(rows % 2 == 0, -1, (rows // 2) * 2)
    return torch.stack([rows, other.masked_fill(other == rows, -1)], 1)


def hard(b: dict[str, Tensor]) -> Tensor:
    """Two hard negatives of every row, which move with the features."""
    return torch.stack([b["x"].flip(1), b["y"].flip(1)], 1)


def guide(b: dict[str, Tensor], negatives: bool = True) -> tuple[Tensor, ...]:
    """A guide's features, of a width of their own."""
    x, y = b["x"].detach().float()[:, :4], b["y"].detach().float()[:, :4]
    return (x, x + y, *([hard(b).detach().float()[..., :4]] if negatives else []))


WAYS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")

Call = Any
#: By name: the loss of a batch; `own` says how many rows each rank has, of which this is one, or None of all.
CASES: dict[str, Call] = {
    "queue": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s, queue=filled_queue(), ids=b["ids"], **o),
    "queue dcl": lambda b, s, **o: ck.info_nce(
        b["x"], b["y"], s, queue=filled_queue(), include_positive=False, weight=b["weight"], **o
    ),
    "positive_logits": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s, positive_logits=b["logits"], **o),
    "positive_features": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s, positive_features=b["x"].flip(1), **o),
    "debiased": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s, debiased=0.1, hardness_beta=0.5, normalize=True, **o),
    "weight_fn": lambda b, s, **o: ck.info_nce(
        b["x"], b["y"], s, weight_fn=ck.von_mises_fisher_weights, include_positive=False, **o
    ),
    "views weight_fn": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s, weight_fn=ck.von_mises_fisher_weights, include_positive=False, **o
    ),
    "smoothing": lambda b, s, **o: ck.clip_loss(b["x"], b["y"], s, label_smoothing=0.2, weight=b["weight"], **o),
    "two biases": lambda b, s, **o: ck.clip_loss(b["x"], b["y"], s, candidate_bias=(b["bias"], b["logits"]), **o),
    "margin": lambda b, s, **o: ck.nt_xent(b["x"], b["y"], s, margin=0.5, **o),
    "sup_con": lambda b, s, **o: ck.sup_con(b["x"], b["labels"], s, weight=b["weight"], **o),
    "sup_con inside": lambda b, s, **o: ck.sup_con(
        b["x"], b["labels"], s, y=b["y"], y_labels=b["ids"], variant="inside", **o
    ),
    "multi_positive": lambda b, s, **o: ck.multi_positive_nce(b["x"], b["labels"], s, **o),
    "multi_positive of others": lambda b, s, **o: ck.multi_positive_nce(
        b["x"], b["labels"], s, y=b["y"], y_labels=b["ids"], normalize=True, **o
    ),
    "ranking": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, negatives=hard(b), weight=b["weight"], **o
    ),
    "ranking ring": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, negatives=hard(b), normalize=True, strategy="ring", **o
    ),
    "ranking ways": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, negatives=hard(b), directions=WAYS, weight=b["weight"], **o
    ),
    "ranking hardness": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, negatives=hard(b), hardness_mode="hard_negatives", hardness_strength=2.0, **o
    ),
    "ranking guided": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, negatives=hard(b), guided=guide(b), guided_margin=("relative", 0.2), directions=WAYS, **o
    ),
    "ranking per direction": lambda b, s, **o: ck.multiple_negatives_ranking(
        b["x"], b["y"], s, directions=WAYS[::2], partition="per_direction", normalize=True, **o
    ),
    "guided": lambda b, s, **o: ck.info_nce(
        b["x"], b["y"], s, guided=guide(b, False), guided_margin=0.3, ids=b["ids"], weight=b["weight"], **o
    ),
    "guided clip": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], s, guided=guide(b, False), normalize=True, return_metrics=True, **o
    ),
    "guided views": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s, guided=guide(b, False), guided_margin=("relative", 0.2), weight=b["weight"], **o
    ),
    "metrics": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s, ids=b["ids"], return_metrics=True, **o),
    "metrics ring": lambda b, s, **o: ck.info_nce(
        b["x"], b["y"], s, weight=b["weight"], include_positive=False, strategy="ring", return_metrics=True, **o
    ),
    "metrics clip": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], s, ids=(b["ids"], b["labels"]), weight=b["weight"], return_metrics=True, **o
    ),
    "metrics views": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s, weight=b["weight"], return_metrics=True, **o
    ),
    "metrics smoothing": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], s, label_smoothing=0.1, return_metrics=True, **o
    ),
    "metrics sup_con": lambda b, s, **o: ck.sup_con(b["x"], b["labels"], s, return_metrics=True, **o),
    "scales": lambda b, s, **o: ck.info_nce(b["x"], b["y"], s * b["logits"], ids=b["ids"], return_metrics=True, **o),
    "scales decomposable": lambda b, s, **o: ck.decomposable(
        b["x"], b["y"], s * b["logits"], b["weight"], strategy="ring", **o
    ),
    "scales clip": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], (s * b["logits"], b["bias"]), weight=b["weight"], return_metrics=True, **o
    ),
    "scales clip grid": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], s * b["logits"], ids=b["ids"], include_positive=False, strategy="grid", **o
    ),
    "scales views": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s * b["logits"], weight=b["weight"], return_metrics=True, **o
    ),
    "scales views ring": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s * b["logits"], ids=b["labels"], strategy="ring", return_metrics=True, **o
    ),
    "scales margin": lambda b, s, **o: ck.clip_loss(
        b["x"], b["y"], (s * b["logits"], b["bias"]), margin=0.3, return_metrics=True, **o
    ),
    "scales smoothing": lambda b, s, **o: ck.nt_xent(
        b["x"], b["y"], s * b["logits"], label_smoothing=0.1, return_metrics=True, **o
    ),
    "scales sup_con": lambda b, s, **o: ck.sup_con(
        b["x"], b["labels"], s * b["logits"], y=b["y"], y_labels=b["ids"], return_metrics=True, **o
    ),
}  # fmt: skip
LEAVES = ("x", "y", "bias", "logits")


def outcome(name: str, batch: dict[str, Tensor], part: slice, factor: Tensor, **over: Any) -> dict[str, Tensor]:
    """Value and gradients of some rows."""
    own = {key: v[part].clone().requires_grad_(key in LEAVES) for key, v in batch.items()}
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    value, found = CASES[name](own, scale, **over), {}
    if isinstance(value, tuple):
        value, told = value
        found = {f"metric {key}": v for key, v in told._asdict().items() if v is not None}
    found["value"] = value.detach()
    torch.autograd.backward(value, factor if value.dim() == 0 else factor.expand(len(value)))
    assert scale.grad is not None
    found["scale"] = scale.grad
    found |= {key: own[key].grad for key in LEAVES if own[key].grad is not None}
    return found


def on_ranks(sizes: list[int], reductions: list[str]) -> list[dict[str, Tensor]]:
    rank, batch = dist.get_rank(), drawn(sum(sizes))
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    one = torch.tensor(1.0, dtype=torch.float64)
    return [
        outcome(name, batch, part, one, group="world", gradients="sum", uneven=True, reduction=reduction)
        for name in CASES
        for reduction in reductions
    ]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_loss_of_one_process(sizes, tmp_path):
    reductions = ["mean", "sum", "none"]
    results, batch = succeeded(run(len(sizes), on_ranks, tmp_path, sizes, reductions)), drawn(sum(sizes))
    keys = [(name, reduction) for name in CASES for reduction in reductions]
    for i, (name, reduction) in enumerate(keys):
        found = [each[i] for each in results]
        wanted = outcome(name, batch, slice(None), torch.tensor(1.0, dtype=torch.float64), reduction=reduction)
        said, tolerance = f"{name} {reduction}", {"rtol": 1e-9, "atol": 1e-11}
        for key, value in wanted.items():
            mine = [one[key] for one in found if key in one]
            if key == "scale":
                got = torch.stack(mine).sum(0)
            elif key[:6] not in ("value", "metric") or (key, reduction) == ("value", "none"):
                halves = [each.chunk(2) for each in mine] if value.shape[0] == 2 * sum(sizes) else [(m,) for m in mine]
                got = torch.cat([torch.cat(parts) for parts in zip(*halves)])
            else:
                assert all(torch.equal(each, mine[0]) for each in mine), said
                got = mine[0]
            torch.testing.assert_close(got, value, **tolerance, msg=lambda m, said=said, key=key: f"{said} {key}: {m}")


def of_several(sizes: list[int]) -> dict[str, Tensor]:
    rank = dist.get_rank()
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = (drawn(sum(sizes))[key][part].clone().requires_grad_() for key in ("x", "y"))
    value = ck.info_nce(x, y, 2.0, positives=several(len(x)), group="world", uneven=True)
    value.backward()
    return {"value": value.detach(), "x": x.grad, "y": y.grad}


def test_several_positives_count_among_a_ranks_own(tmp_path):
    sizes = [4, 3]
    found = succeeded(run(2, of_several, tmp_path, sizes))
    index = torch.cat([several(4), torch.where(several(3) < 0, -1, several(3) + 4)])
    x, y = (drawn(7)[key].requires_grad_() for key in ("x", "y"))
    wanted = ck.info_nce(x, y, 2.0, positives=index)
    wanted.backward()
    for one in found:
        torch.testing.assert_close(one["value"], wanted.detach(), rtol=1e-12, atol=1e-12)
    for key, leaf in (("x", x), ("y", y)):  # "average": two ranks hold twice as much
        torch.testing.assert_close(torch.cat([one[key] for one in found]), 2 * leaf.grad, rtol=1e-10, atol=1e-12)


def mistaken() -> list[str]:
    """One rank's own mistakes, which the others hear of."""
    last, said = dist.get_rank() == 1, []
    b, ranking = drawn(4), ck.multiple_negatives_ranking
    x, y = b["x"].requires_grad_(), b["y"]
    mistakes: list[Any] = [
        lambda: ck.info_nce(x, y, 2.0, label_smoothing=0.2 if last else 0.1, group="world"),
        lambda: ck.info_nce(x, y, 2.0, candidate_bias=b["bias"][: 4 - last], group="world"),
        lambda: ck.info_nce(x, y, 2.0, candidate_bias=b["bias"] if last else None, group="world"),
        lambda: ck.info_nce(x, y, 2.0, queue=filled_queue(), positives=9 if last else 0, group="world"),
        lambda: ck.sup_con(x, b["labels"], 2.0, variant="inside" if last else "outside", group="world"),
        lambda: ck.sup_con(x, b["labels"], 2.0, variant="beside", group="world"),
        lambda: ck.sup_con(x, b["labels"], 2.0, y=y if last else None, group="world"),
        lambda: (ck.sup_con if last else ck.multi_positive_nce)(x, b["labels"], 2.0, group="world"),
        lambda: ck.clip_loss(x[: 4 - last], y[: 4 - last], 2.0, margin=0.1, group="world"),
        lambda: ranking(x, y, 2.0, negatives=hard(b)[:, : 2 - last], directions=WAYS, group="world"),
        lambda: ranking(x, y, 2.0, negatives=hard(b)[:, : 2 - last], uneven=True, group="world"),
        lambda: ranking(x, y, 2.0, negatives=None if last else hard(b), uneven=True, group="world"),
        lambda: ranking(x, y, 2.0, directions=WAYS[: 4 - last], group="world"),
        lambda: ranking(x, y, 2.0, negatives=hard(b)[: 4 - last], group="world"),
        lambda: ranking(x, y, 2.0, guided=guide(b, False) if last else None, group="world"),
        lambda: ranking(x, y, 2.0, guided=guide(b, last), group="world"),
        lambda: ranking(x, y, 2.0, guided=guide(b, False), workspace_bytes=8 if last else None, group="world"),
        lambda: ck.clip_loss(x, y, 2.0, return_metrics=last, group="world"),
        lambda: ck.info_nce(x, y, b["logits"] if last else 1.0, group="world"),
        lambda: ck.nt_xent(x, y, b["logits"] if last else 1.0, margin=0.1, group="world"),
        lambda: ck.clip_loss(x, y, (b["logits"], b["bias"][: 4 - last]), group="world"),
        lambda: ck.decomposable(x, y, b["logits"] if last else 1.0, b["bias"], group="world"),
        lambda: ck.clip_loss(x, y, 2.0, guided=guide(b, False) if last else None, group="world"),
        lambda: ck.info_nce(x, y, 2.0, guided=guide(b, False), guided_margin=0.1 * last, group="world"),
        lambda: ck.nt_xent(x, y, 2.0, guided=[v[: 4 - last] for v in guide(b, False)], group="world"),
        lambda: ck.sup_con(x, b["labels"], 2.0, return_metrics=last, group="world"),
        lambda: ck.info_nce(
            x, y, 2.0, return_metrics=True, positive_logits=b["logits"] if last else None, group="world"
        ),
    ]
    for mistake in mistakes:
        with pytest.raises(ValueError) as caught:
            mistake()
        said.append(str(caught.value))
    return said


def test_a_mistake_of_one_rank_is_an_error_on_all(tmp_path):
    one, other = succeeded(run(2, mistaken, tmp_path))
    assert one == other
    of_negatives = [said for said in one if "got negatives=[2, 6] of" in said]
    assert len(of_negatives) == 2 and of_negatives[0] == of_negatives[1]
