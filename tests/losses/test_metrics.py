"""What losses tell beside their value: against the definition in float64, and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import CPU_BACKENDS
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck
from contrastive_kernels.reference.metrics import label_metrics_of_logits, metrics_of_logits

N, M, D, SCALE = 70, 90, 16, 9.0


def features(n: int = N, m: int = M) -> tuple[Tensor, Tensor]:
    """Positives that are close, so that accuracies are of all sizes."""
    g = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(n, D, generator=g), dim=1)
    y = normalize(torch.randn(m, D, generator=g), dim=1)
    y[:n] = normalize(y[:n] + 0.6 * x[:m], dim=1)
    return x, y


def logits(x: Tensor, y: Tensor) -> Tensor:
    return SCALE * x.double() @ y.double().T


def assert_told(found: ck.LossMetrics, wanted: dict[str, Tensor]) -> None:
    for name, want in wanted.items():
        got = getattr(found, name)
        assert got.shape == () and not got.requires_grad and got.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workspace", [2**20, 40_000], ids=["whole", "panels"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_info_nce(backend, reduction, workspace):
    """Ids, biases with padding, positives anywhere, weights, a margin, smoothing, no positive in the denominator."""
    workspace = 150_000 if backend == "torch" and workspace == 40_000 else workspace  # whose searches want more
    x, y = features()
    places = torch.arange(N).flip(0)
    ids, bias = (torch.arange(N) % 5, torch.arange(M) % 9), torch.linspace(-1, 1, M)
    bias[5] = -torch.inf
    weight, alike = (torch.arange(N) % 3).float(), ids[0][:, None] == ids[1]
    z = logits(x, y)
    own = z.diagonal()[:, None]
    padded = (torch.arange(N) != 5).double()
    cases: list[tuple[dict[str, Any], Tensor, dict[str, Any]]] = [
        ({}, z, {}),
        ({"weight": weight}, z, {"weight": weight}),
        ({"ids": ids}, z, {"left_out": alike}),
        ({"positives": places}, z, {"positives": places}),
        ({"margin": 0.1}, z, {"too_high": z > own + 0.1}),
        ({"include_positive": False, "ids": ids}, z, {"include_positive": False, "left_out": alike}),
        ({"label_smoothing": 0.1, "weight": weight}, z, {"weight": weight}),
        ({"candidate_bias": bias, "ids": ids}, z + bias, {"left_out": alike, "weight": padded}),
    ]
    for given, of_rows, said in cases:
        options: dict[str, Any] = {"backend": backend, "reduction": reduction, "workspace_bytes": workspace, **given}
        loss, found = ck.info_nce(x, y, SCALE, return_metrics=True, **options)
        assert torch.equal(loss, ck.info_nce(x, y, SCALE, **options))
        said.setdefault("positives", torch.arange(N))
        assert_told(found, metrics_of_logits(of_rows, **said))
        assert found.top1_back is None and found.top5_back is None
    assert 0.1 < found.top1 < found.top5 < 0.95


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_clip_loss_and_nt_xent(backend, reduction):
    """Both directions, and all views."""
    x, y = features(N, N)
    weight, ids = (torch.arange(N) % 3).float(), torch.arange(N) % 30
    z, own = logits(x, y), torch.arange(N)
    for given in ({}, {"weight": weight, "ids": ids}, {"margin": 0.2}, {"include_positive": False}):
        said: dict[str, Any] = {"weight": given.get("weight"), "include_positive": given.get("include_positive", True)}
        alike = ids[:, None] == ids if "ids" in given else None
        high = [v > v.diagonal()[:, None] + 0.2 if "margin" in given else None for v in (z, z.T)]
        there, back = (metrics_of_logits(v, own, left_out=alike, too_high=h, **said) for v, h in zip((z, z.T), high))
        options: dict[str, Any] = {"backend": backend, "reduction": reduction, **given}
        loss, found = ck.clip_loss(x, y, SCALE, return_metrics=True, **options)
        assert torch.equal(loss, ck.clip_loss(x, y, SCALE, **options))
        both = (there["log_sum_exp"] + back["log_sum_exp"]) / 2
        assert_told(found, {**there, "top1_back": back["top1"], "top5_back": back["top5"], "log_sum_exp": both})
        views = torch.cat([x, y])
        of_views, positives = logits(views, views), torch.cat([own + N, own])
        itself = torch.eye(2 * N, dtype=torch.bool)
        out = itself if alike is None else itself | alike.repeat(2, 2)
        too_high = of_views > (SCALE * (views * views[positives]).sum(1))[:, None] + 0.2 if "margin" in given else None
        if said["weight"] is not None:
            said["weight"] = weight.repeat(2)
        loss, found = ck.nt_xent(x, y, SCALE, return_metrics=True, **options)
        assert torch.equal(loss, ck.nt_xent(x, y, SCALE, **options))
        assert_told(found, metrics_of_logits(of_views, positives, left_out=out, too_high=too_high, **said))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scales_by_row(backend, reduction):
    """Each direction's metrics are by its own scales, among them a negative one; of both views by their sample's."""
    x, y = features(N, N)
    own, weight = torch.arange(N), (torch.arange(N) % 3).float()
    scales = torch.linspace(-3, 9, N), torch.linspace(12, 2, N)
    dots, views = x.double() @ y.double().T, torch.cat([x, y]).double()
    both = scales[0].double()[:, None] * dots, scales[1].double()[:, None] * dots.T
    of_views, positives = scales[1].repeat(2).double()[:, None] * (views @ views.T), torch.cat([own + N, own])
    for given in ({}, {"weight": weight, "ids": torch.arange(N) % 30}, {"margin": 0.2}, {"label_smoothing": 0.1}):
        options: dict[str, Any] = {"backend": backend, "reduction": reduction, **given}
        alike = options["ids"][:, None] == options["ids"] if "ids" in given else None
        high = [z > z.diagonal()[:, None] + 0.2 if "margin" in given else None for z in both]
        told = [
            metrics_of_logits(z, own, left_out=alike, too_high=h, weight=given.get("weight"))
            for z, h in zip(both, high)
        ]
        wanted = {name: (told[0][name] + told[1][name]) / 2 for name in ("positive_logit", "log_sum_exp")}
        wanted |= {f"{name}{way}": each[name] for name in ("top1", "top5") for way, each in zip(("", "_back"), told)}
        loss, found = ck.clip_loss(x, y, scales, return_metrics=True, **options)
        assert torch.equal(loss, ck.clip_loss(x, y, scales, **options))
        assert_told(found, wanted)
        out = torch.eye(2 * N, dtype=torch.bool)
        out = out if alike is None else out | alike.repeat(2, 2)
        above = of_views.gather(1, positives[:, None]) + 0.2
        loss, found = ck.nt_xent(x, y, scales[1], return_metrics=True, **options)
        assert torch.equal(loss, ck.nt_xent(x, y, scales[1], **options))
        said = {"weight": weight.repeat(2) if "weight" in given else None, "left_out": out}
        too_high = of_views > above if "margin" in given else None
        assert_told(found, metrics_of_logits(of_views, positives, too_high=too_high, **said))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_sup_con(backend, reduction):
    """One set, and queries against labelled candidates; a row alone in its class is left out."""
    x, y = features()
    labels, others = torch.arange(N) % 23, torch.arange(M) % 20
    centers = normalize(torch.randn(23, D, generator=torch.Generator().manual_seed(1)), dim=1)
    x, y = (normalize(v + 0.6 * centers[of], dim=1) for v, of in ((x, labels), (y, others)))
    labels[0], weight = -5, (torch.arange(N) % 3).float()
    for wide in (False, True):
        given: dict[str, Any] = {"y": y, "y_labels": others} if wide else {}
        cols, against = (others, y) if wide else (labels, x)
        own = torch.zeros(N, M, dtype=torch.bool) if wide else torch.eye(N, dtype=torch.bool)
        for weights in (None, weight):
            options: dict[str, Any] = {"backend": backend, "reduction": reduction, "weight": weights, **given}
            loss, found = ck.sup_con(x, labels, SCALE, return_metrics=True, **options)
            assert torch.equal(loss, ck.sup_con(x, labels, SCALE, **options))
            wanted = label_metrics_of_logits(logits(x, against), labels[:, None] == cols, own, weights)
            assert_told(found, wanted)
            assert 0 < wanted["top1"] < wanted["top5"] < 1
    module = ck.SupConLoss(return_metrics=True)(x, labels, SCALE)
    assert torch.equal(module[1].top1, ck.sup_con(x, labels, SCALE, return_metrics=True)[1].top1)
    with pytest.raises(ValueError, match="return_metrics: expected False with variant='inside'"):
        ck.sup_con(x, labels, SCALE, variant="inside", return_metrics=True)


def test_by_hand():
    """Of three rows the first finds its positive, the second another one first; the third has a tie."""
    x = torch.eye(3, requires_grad=True)
    y = torch.tensor([[1.0, 0, 0], [0.5, 0.6, 1.0], [0, 0.9, 1.0]])
    loss, found = ck.info_nce(x, y, 2.0, return_metrics=True)
    assert found.top1.item() == pytest.approx(1 / 3) and found.top5.item() == 1
    assert found.positive_logit.item() == pytest.approx(2 * (1 + 0.6 + 1) / 3)
    rows = [[2, 1, 0], [0, 1.2, 1.8], [0, 2, 2]]
    assert found.log_sum_exp.item() == pytest.approx(sum(math.log(sum(map(math.exp, r))) for r in rows) / 3)
    assert loss.requires_grad and not any(v is not None and v.requires_grad for v in found)
    texts = ck.clip_loss(x, y, 2.0, return_metrics=True)[1]
    assert texts.top1_back.item() == pytest.approx(2 / 3)  # of the second text, the third image comes first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_features_that_have_collapsed_find_nothing(dtype):
    x = normalize(torch.randn(1, 200), dim=1).to(dtype).expand(300, 200)
    found = ck.clip_loss(x, x, 50.0, return_metrics=True)[1]
    assert found.top1 == found.top5 == found.top1_back == 0
    x = x.clone()
    x[7] = torch.nan
    assert ck.info_nce(x, x, 50.0, return_metrics=True)[1].top5 == 0


def test_no_rows_and_one():
    for n in (0, 1):
        x = torch.ones(n, 4)
        for loss in (ck.info_nce, ck.clip_loss, ck.nt_xent):
            value, found = loss(x, x, 2.0, return_metrics=True)
            assert value == 0 and found.top1 == n and found.positive_logit == 8 * n == found.log_sum_exp


def test_modules_compiled_and_under_autocast():
    x, y = features(N, N)
    for name in ("InfoNCELoss", "ClipLoss", "NTXentLoss"):
        module, usual = (getattr(ck, name)(return_metrics=asked) for asked in (True, False))
        loss, found = module(x, y, SCALE)
        assert torch.equal(loss, usual(x, y, SCALE)) and isinstance(usual(x, y, SCALE), Tensor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = module(x, y, SCALE)[1]
        assert abs(again.top5 - found.top5) < 0.05
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x, y, SCALE)
    assert all(torch.allclose(a, b) for a, b in zip(compiled[1], found) if b is not None)
    bias = torch.zeros((), requires_grad=True)
    loss, _ = ck.ClipLoss(return_metrics=True)(x, y, SCALE, bias)
    assert torch.autograd.grad(loss, bias)[0] == 0


def test_where_there_are_none():
    x, y = features(N, N)
    vector, queue = torch.ones(N), ck.FeatureQueue(4, D)
    for loss, said, name in (
        (ck.info_nce, {"queue": queue}, "queue"),
        (ck.info_nce, {"positives": torch.arange(N)[:, None]}, r"positives of shape \[N, P\]"),
        (ck.info_nce, {"hardness_beta": 1.0}, "hardness_beta"),
        (ck.clip_loss, {"candidate_bias": vector}, "candidate_bias"),
    ):
        with pytest.raises(ValueError, match=f"return_metrics: expected False with {name}"):
            loss(x, y, **{"logit_scale": SCALE, **said}, return_metrics=True)
    with pytest.raises(ValueError, match="output_dict: expected False with return_metrics"):
        ck.ClipLoss(return_metrics=True)(x, y, SCALE, output_dict=True)
    one_scale = ck.info_nce(x, y, torch.full((N,), SCALE), return_metrics=True)[1]
    assert one_scale.top1 == ck.info_nce(x, y, SCALE, return_metrics=True)[1].top1


def test_operators_are_what_a_compiler_may_take_them_for():
    x, y = features(6, 6)
    params, ids, exclude = torch.tensor([SCALE, 0.0, 0.0]), torch.arange(6) % 2, torch.arange(6)[:, None]
    operators = torch.ops.contrastive_kernels
    said = [torch.zeros(6), ids, ids, None, None]
    torch.library.opcheck(operators.count_lower.default, (x, y, params, x[:, 0], exclude, said, False, "torch", 2**20))
    torch.library.opcheck(operators.best_alike.default, (x, y, params, ids, ids, True, "torch", 2**20))
