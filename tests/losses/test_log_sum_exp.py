"""The log-sum-exp of rows, which losses of one's own are made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from derivatives import gradcheck, gradgradcheck
from problems import BY_NAME, make_inputs, score_dtype, smallest_workspace
from tolerance import LOGIT_UNITS, UNITS, assert_accurate

import contrastive_kernels as ck
from contrastive_kernels import reference

#: Problems that are asked of it, and whether positives are left out.
NAMES = ("base", "panels", "wide-panels", "offset-panels", "index", "t0.005", "zero-scale", "ids", "ids-panels",
         "candidate-bias", "padded", "padded-index", "misaligned", "d123")  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def found_of(module, inputs, dtype, **options):
    """Value and gradients of a random combination of the rows."""
    score = score_dtype(dtype)
    leaves = {"x": inputs.x.to(dtype), "y": inputs.y.to(dtype), "scale": inputs.scale.to(score)}
    if inputs.candidate_bias is not None:
        leaves["candidate_bias"] = inputs.candidate_bias.to(score)
    leaves = {name: v.detach().clone().requires_grad_() for name, v in leaves.items()}
    said = {"ids": inputs.ids, "candidate_bias": leaves.get("candidate_bias")}
    if inputs.problem.positives is not None:
        said["positives"] = inputs.positives
    value = module.log_sum_exp(leaves["x"], leaves["y"], leaves["scale"], **said, **options)
    upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream.to(value))
    return {"value": value.detach(), **dict(zip(leaves, gradients))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name, dtype, backend):
    dtype = DTYPES[dtype]
    if dtype == torch.float64 and backend == "cpu":
        with pytest.raises(ValueError, match="float64 is the torch backend's"):
            found_of(ck, make_inputs(BY_NAME[name], dtype), dtype, backend=backend)
        return
    inputs = make_inputs(BY_NAME[name], dtype)
    truth, torch_found = (found_of(reference, inputs, d) for d in (torch.float64, torch.float32))
    ratio = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1.0
    rounded = {n: v.to(dtype) if n in ("x", "y") and dtype != torch.float64 else v for n, v in torch_found.items()}
    options = {"backend": backend}
    if inputs.problem.small_panels:
        options["workspace_bytes"] = smallest_workspace(
            lambda size: found_of(ck, inputs, dtype, backend=backend, workspace_bytes=size)
        )
    ours = found_of(ck, inputs, dtype, **options)
    floors = _floors(inputs, dtype, truth)
    for key, want in truth.items():
        error = (rounded[key].double() - want).abs() * ratio
        assert ours[key].dtype == (dtype if key in ("x", "y") else score_dtype(dtype))
        assert_accurate(key, ours[key], want, error.nan_to_num(0.0), floors[key])


def _floors(inputs, dtype, truth):
    """As those of the losses: roundings of the largest contribution, and of the logits."""
    x, y, scale = inputs.x.double(), inputs.y.double(), inputs.scale.double().abs()
    score_eps, eps = torch.finfo(score_dtype(dtype)).eps, torch.finfo(dtype).eps
    z = inputs.scale.double() * (x @ y.T)
    said = {
        "ids": inputs.ids,
        "candidate_bias": None if inputs.candidate_bias is None else inputs.candidate_bias.double(),
    }
    if inputs.problem.positives is not None:
        said["positives"] = inputs.positives
    z.requires_grad_()
    value = reference.log_sum_exp(z, torch.eye(z.shape[1], dtype=torch.float64), 1.0, **said)
    upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
    (w,) = torch.autograd.grad(value, z, upstream)
    w = w.abs()
    logits = LOGIT_UNITS * score_eps * (scale * x.norm(dim=1)[:, None] * y.norm(dim=1) + 3)
    carried = w * (UNITS * eps + logits)
    return {
        "value": logits.amax(1) + UNITS * score_eps * truth["value"].abs(),
        "x": (scale * y.abs().max() * carried.sum(1))[:, None],
        "y": (scale * x.abs().max() * carried.sum(0))[:, None],
        "scale": (w * (UNITS * score_eps + logits) * (x @ y.T).abs()).sum(),
        "candidate_bias": carried.sum(0),
    }


def test_sums_by_hand():
    x, y = (torch.randn(k, 3, dtype=torch.float64) for k in (3, 4))
    bias, rows, cols = torch.tensor([0.5, -torch.inf, 0.0, 1.0], dtype=torch.float64), [1, 2, 3], [2, 1, 3, 1]
    left_out = [3, -1, 2]
    want = []
    for i in range(3):
        terms = [
            math.exp(1.5 * float(x[i] @ y[j]) + float(bias[j]))
            for j in range(4) if cols[j] != rows[i] and j != left_out[i]
        ]  # fmt: skip
        want.append(math.log(sum(terms)))
    said = {"ids": (torch.tensor(rows), torch.tensor(cols)), "candidate_bias": bias}
    said["positives"] = torch.tensor(left_out)
    for module in (reference, ck):
        torch.testing.assert_close(module.log_sum_exp(x, y, 1.5, **said), torch.tensor(want, dtype=torch.float64))


def test_derivatives():
    x, y = (torch.randn(k, 3, dtype=torch.float64, requires_grad=True) for k in (3, 4))
    scale, bias = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    ids = torch.tensor([0, 1, 2]), torch.tensor([2, 1, 1, 5])

    def function(x, y, scale, bias):
        return ck.log_sum_exp(x, y, scale, ids=ids, candidate_bias=bias, positives=1)

    for check in (gradcheck, gradgradcheck):
        assert check(function, (x, y, scale, bias.requires_grad_()))


def test_a_row_of_nothing_has_minus_infinity_and_no_gradient(backend):
    x, y = (torch.randn(k, 8, requires_grad=True) for k in (3, 5))
    ids = torch.tensor([1, 0, 1]), torch.zeros(5, dtype=torch.int64)
    found = ck.log_sum_exp(x, y, 2.0, ids=ids, backend=backend)
    assert found[1] == -torch.inf and found[[0, 2]].isfinite().all()
    dx, dy = torch.autograd.grad(found[found > -torch.inf].sum(), (x, y))
    assert (dx[1] == 0).all() and dx.isfinite().all() and dy.isfinite().all()
    padded = ck.log_sum_exp(x, torch.full_like(y, torch.nan), 2.0, candidate_bias=torch.full((5,), -torch.inf))
    assert (padded == -torch.inf).all()


def test_losses_are_made_of_it(backend):
    """InfoNCE is the difference to the positive's logit."""
    inputs = make_inputs(replace(BY_NAME["base"], n=70), torch.float32)
    x, y, scale = inputs.x, inputs.y, inputs.scale
    loss = ck.log_sum_exp(x, y, scale, backend=backend) - scale * (x * y).sum(1)
    torch.testing.assert_close(loss, ck.info_nce(x, y, scale, reduction="none", backend=backend), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_it_compiles_into_one_graph():
    compiled = torch.compile(
        lambda x, y, ids, bias: ck.log_sum_exp(x, y, 3.0, ids=(ids, ids), candidate_bias=bias), fullgraph=True,
        dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for n in (20, 33):
        x, y, bias = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8), torch.randn(n, requires_grad=True)
        found = compiled(x, y, torch.arange(n) % 4, bias)
        want = ck.log_sum_exp(x, y, 3.0, ids=torch.arange(n) % 4, candidate_bias=bias)
        torch.testing.assert_close(found, want)
        pair = [torch.autograd.grad(v.sum(), (x, bias)) for v in (found, want)]
        torch.testing.assert_close(*pair)
