"""A plan of a loss with what it is given beside: the panels that the driver walks, and what is refused."""

from __future__ import annotations

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.backends import registry

MIB = 2**20
N, M = 700, 300


def given(name: str, loss: str, n: int) -> dict[str, object]:
    """The argument of this name."""
    return {
        "ids": {"ids": torch.arange(n) % 50},
        "candidate_bias": {"candidate_bias": torch.linspace(-1, 1, n)},
        "margin": {"margin": 0.5},
        "guided": {"guided": (torch.randn(n, 8), torch.randn(n, 8))},
        "label_smoothing": {"label_smoothing": 0.1},
        "include_positive": {"include_positive": False},
        "logit_scale": {"logit_scale": torch.linspace(1, 2, n)},
    }[name]


CASES = [
    (loss, members, size)
    for loss in ("info_nce", "clip_loss", "nt_xent", "decomposable")
    for members in (
        ("ids", "margin"),
        ("candidate_bias",),
        ("logit_scale",),
        ("label_smoothing",),
        ("include_positive",),
        ("guided",),
        ("guided", "candidate_bias"),
        ("guided", "logit_scale"),
    )
    for size in (2, 64)
    if loss != "decomposable" or members[0] not in ("label_smoothing", "include_positive", "guided")
]


@pytest.mark.parametrize("loss, members, size", CASES)
def test_plan_counts_what_the_driver_does(loss, members, size, monkeypatch):
    """Panels of either pass, of both directions where each is a pass of its own."""
    counted = {"reduce": 0, "weigh": 0}
    kind = type(registry.get("torch"))
    for name, operation in (("reduce", kind.reduce_panel), ("weigh", kind.weight_panel)):

        def counting(self, term, panel, name=name, operation=operation):
            counted[name] += 1
            operation(self, term, panel)

        monkeypatch.setattr(kind, operation.__name__, counting)
    x, y = (torch.randn(N, 8).requires_grad_() for _ in range(2))
    options = {k: v for name in members for k, v in given(name, loss, N).items()}
    scale = options.pop("logit_scale", 1.0)
    more = (torch.zeros(N),) if loss == "decomposable" else ()
    workspace = {"backend": "torch", "workspace_bytes": size * MIB}
    getattr(ck, loss)(x, y, scale, *more, **options, **workspace).backward()
    plan = ck.plan(N, d=8, loss=loss, members=members, **workspace)
    assert {each.name: each.panels for each in plan.passes} == {k: v for k, v in counted.items() if v}
    assert plan.loss == loss


def test_a_guide_takes_a_product_of_each_pass_or_of_a_band():
    for loss, size, more in (("clip_loss", 1, 2.0), ("nt_xent", 1, 1.0), ("info_nce", 64, 1.0), ("clip_loss", 64, 1.0)):
        n, options = (2048, {"loss": loss, "d": 64, "backend": "torch", "workspace_bytes": size * MIB})
        if (loss, size) == ("clip_loss", 64):
            n = 1024
        plain, guided = (ck.plan(n, members=members, **options) for members in ((), ("guided",)))
        assert guided.products == plain.products + more, loss
        assert guided.place == plain.place and guided.workspace_bytes <= size * MIB
        assert sum(each.bytes for each in guided.passes) > sum(each.bytes for each in plain.passes)
    on_gpu = [ck.plan(4096, device="cuda", capability=90, members=members) for members in (("margin",), ("guided",))]
    if on_gpu[0].backend == "triton":  # whose kernels make them in a tile
        first, second = ([each.launches for each in plan.passes] for plan in on_gpu)
        assert first == second


def test_directions_and_scales_take_what_they_take():
    plain, biased = (
        ck.plan(4096, d=64, members=m, backend="torch", workspace_bytes=MIB) for m in ((), ("candidate_bias",))
    )
    assert biased.products == 2 * plain.products
    one = ck.plan(4096, d=64, loss="info_nce", backend="torch", workspace_bytes=MIB)
    assert sum(p.flop for p in biased.passes) == 2 * sum(p.flop for p in one.passes)
    for members, like in (({"logit_scale"}, plain), ({"logit_scale", "candidate_bias"}, biased)):
        scaled = ck.plan(4096, d=64, members=members, backend="torch", workspace_bytes=MIB)
        assert [p.panels for p in scaled.passes] == [p.panels for p in like.passes]
    on_gpu = [ck.plan(4096, device="cuda", capability=90, members=m) for m in ((), ("logit_scale",))]
    assert on_gpu[1].products == 2 * on_gpu[0].products
    assert ck.plan(64, dtype=torch.bfloat16, members=("logit_scale",)).dtype == torch.float32
    views = ck.plan(64, loss="nt_xent", members=("logit_scale",), backend="torch")
    assert views.products > ck.plan(64, loss="nt_xent", backend="torch").products


@pytest.mark.parametrize(
    "loss, members, error, words",
    [
        ("sigmoid", ("margin",), ValueError, "members: expected some of ids, candidate_bias for sigmoid; got 'margin'"),
        ("decomposable", ("label_smoothing",), ValueError, "members: expected some of ids, candidate_bias, margin"),
        ("clip_loss", "ids", TypeError, "members: expected a sequence of names of arguments; got 'ids'"),
    ],
)
def test_what_a_loss_does_not_take(loss, members, error, words):
    with pytest.raises(error, match=words):
        ck.plan(64, loss=loss, members=members)


def test_ranks_know_some_of_them():
    assert ck.plan(64, members=("ids", "include_positive"), world=2).over_ranks is not None
    with pytest.raises(ValueError, match="members: expected none but ids and include_positive with a world"):
        ck.plan(64, members=("margin",), world=2)


def test_explain_tells_the_same(capsys):
    x = torch.zeros(64, 8, dtype=torch.bfloat16)
    ck.explain(x, x, members=("logit_scale",))
    printed = capsys.readouterr().out
    assert "torch.float32" in printed and printed.splitlines()[0].startswith("clip_loss of 64 x 64 scores")
    with pytest.raises(ValueError, match="members: expected none for hardest_negatives"):
        ck.explain(x, x, "hardest_negatives", members=("ids",))
