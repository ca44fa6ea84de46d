"""The rule for results of tensor cores, on simulated ones: what it grants, and what it does not."""

from __future__ import annotations

import pytest
import torch
from problems import BY_NAME, Inputs, Outcome, make_inputs, upstream_like
from tolerance import assert_outcome, expected, from_scores
from torch import Tensor

BFLOAT16 = torch.bfloat16
#: Problem, loss, result, and its error on an H200 (triton backend, torch 2.11, Triton 3.6).
MEASURED = (
    ("kept-panels", "info_nce", "value", 3.30e-6),
    ("kept-panels", "nt_xent", "scale", 2.24e-7),
    ("kept-panels", "decomposable", "value", 3.45e-6),
    ("nearly-solved", "info_nce", "value", 4.89e-9),
    ("nearly-solved", "nt_xent", "scale", 5.05e-9),
    ("nearly-solved", "clip_loss", "scale", 2.50e-9),
    ("d384", "decomposable", "scale", 3.41e-7),
    ("d768", "info_nce", "value", 9.07e-7),
    ("d768", "nt_xent", "scale", 4.80e-7),
    ("d768", "decomposable_pair", "scale", 3.78e-7),
    ("d1000", "clip_loss", "value", 1.14e-6),
    ("d1000", "nt_xent", "scale", 7.95e-7),
)
#: A few of them, for what takes longer.
SOME = (("d768", "info_nce"), ("d1000", "nt_xent"), ("kept-panels", "decomposable"), ("nearly-solved", "clip_loss"))


def truncated(v: Tensor, bits: int) -> Tensor:
    """v with so many significant bits, cut off toward zero."""
    mantissa, exponent = torch.frexp(v)
    return torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits)


def product(a: Tensor, b: Tensor, bits: int = 24, start: float = 0.0) -> Tensor:
    """a b + start, summed from `start` in steps of 16 features, each of which truncates the sum."""
    a, b = a.double(), b.double()
    sums = torch.full((a.shape[0], b.shape[1]), start, dtype=torch.float64)
    for k in range(0, a.shape[1], 16):
        sums = truncated(sums + a[:, k : k + 16] @ b[k : k + 16], bits)
    return sums


def kernel_scores(inputs: Inputs, loss: str, bits: int = 24, *, centered: bool = True) -> Tensor:
    """Scores as the Triton kernels make them: sums that start at minus a center, and exact positives."""
    x, y = inputs.x, inputs.y
    shift = 0
    if loss == "nt_xent":
        x, y, shift = torch.cat([x, y]), torch.cat([x, y]), len(x)
    rows = torch.arange(len(x))
    columns = rows.roll(shift)
    dots = (x.double() * y[columns].double()).sum(1)
    center = dots[:16].mean().float().item() if centered else 0.0
    scores = product(x, y.T, bits, -center) + center
    scores[rows, columns] = dots
    return scores


def outcome(inputs: Inputs, loss: str, scores: Tensor) -> Outcome:
    """The loss and its gradients from these scores, with float64 behind them, in the dtypes of the package's."""
    value, w = from_scores(inputs, loss, "mean", scores)
    x, y = inputs.x.double(), inputs.y.double()
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
    dx, dy = inputs.scale.double() * w @ y, inputs.scale.double() * w.T @ x
    if loss == "nt_xent":
        dx, dy = (dx + dy).chunk(2)
    return Outcome(value.float(), {"x": dx.to(BFLOAT16), "y": dy.to(BFLOAT16), "scale": (w * scores).sum().float()})


def inputs_of(name: str) -> Inputs:
    return make_inputs(BY_NAME[name], BFLOAT16)


@pytest.mark.parametrize("name, loss, result, measured", MEASURED)
def test_the_simulation_errs_as_a_gpu_does(name, loss, result, measured):
    """24 bits, within a factor of 1.6; torch's scores have at least half of that error."""
    inputs = inputs_of(name)
    truth = expected(inputs.problem, loss, BFLOAT16, "mean")[0][result]
    x, y = inputs.x, inputs.y
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
    ours, torchs = (
        (outcome(inputs, loss, scores)[result].double() - truth).abs().item()
        for scores in (kernel_scores(inputs, loss), product(x, y.T))
    )
    assert measured / 1.6 < ours < 1.6 * measured
    assert ours / 2 < torchs < ours


@pytest.mark.parametrize("name, loss, result, measured", MEASURED)
def test_a_bias_that_torch_has_too_passes(name, loss, result, measured):
    """... by the rule for tensor cores alone."""
    inputs = inputs_of(name)
    made = outcome(inputs, loss, kernel_scores(inputs, loss))
    assert_outcome(inputs, loss, "mean", made, product)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_outcome(inputs, loss, "mean", made)


@pytest.mark.parametrize("name, loss", SOME)
def test_without_a_center_the_usual_rule_holds(name, loss):
    """Sums that start at 0 and stay near it lose little: most of the bias is that of the center."""
    inputs = inputs_of(name)
    assert_outcome(inputs, loss, "mean", outcome(inputs, loss, kernel_scores(inputs, loss, centered=False)))


@pytest.mark.parametrize("name, loss", SOME)
def test_a_wrong_gradient_of_the_scale_fails(name, loss):
    inputs = inputs_of(name)
    made = outcome(inputs, loss, kernel_scores(inputs, loss))
    made.gradients["scale"] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="dscale"):
        assert_outcome(inputs, loss, "mean", made, product)


@pytest.mark.parametrize("name, loss", SOME)
def test_fewer_bits_fail(name, loss):
    """A kernel that truncates two bits more than torch's product has another reason for its error."""
    inputs = inputs_of(name)
    made = outcome(inputs, loss, kernel_scores(inputs, loss, bits=22))
    with pytest.raises(AssertionError, match=r"error|root mean square"):
        assert_outcome(inputs, loss, "mean", made, product)


@pytest.mark.parametrize("name", ["d768", "kept-panels", "nearly-solved"])
def test_a_positive_among_the_negatives_fails(name):
    """InfoNCE with one row's positive not left out of its denominator."""
    inputs = inputs_of(name)
    right = outcome(inputs, "info_nce", kernel_scores(inputs, "info_nce"))
    x, y, scale = (v.double().requires_grad_() for v in (inputs.x, inputs.y, inputs.scale))
    z = scale * (x @ y.T)
    left_out = torch.eye(len(z), dtype=torch.bool)
    left_out[0, 0] = False
    losses = torch.nn.functional.softplus(z.masked_fill(left_out, -torch.inf).logsumexp(1) - z.diagonal())
    value = losses.mean()
    value.backward(upstream_like(value, inputs.problem.seed))
    gradients = {"x": x.grad.to(BFLOAT16), "y": y.grad.to(BFLOAT16), "scale": scale.grad.float()}
    wrong = Outcome(value.detach().float(), gradients)
    for result in ("value", *gradients):
        mixed = Outcome(right.value, dict(right.gradients))
        if result == "value":
            mixed.value = wrong.value
        else:
            mixed.gradients[result] = gradients[result]
        with pytest.raises(AssertionError, match=result):
            assert_outcome(inputs, "info_nce", "mean", mixed, product)


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "sigmoid", "decomposable"])
def test_tf32_is_measured_by_tf32(loss):
    """Operands rounded to 11 bits pass where torch's are, in the gradients' products too, and fail in float32."""
    inputs = make_inputs(BY_NAME["d768"], torch.float32)

    def rounded_product(a: Tensor, b: Tensor) -> Tensor:
        return product(*(_tf32(v) for v in (a, b)))

    x, y, scale = inputs.x, inputs.y, inputs.scale.double()
    if loss == "nt_xent":
        x = y = torch.cat([x, y])
    scores = rounded_product(x, y.T)
    value, w = from_scores(inputs, loss, "mean", scores)
    dx, dy = rounded_product(scale * w, y), rounded_product(scale * w.T, x)
    if loss == "nt_xent":
        dx, dy = (dx + dy).chunk(2)
    made = Outcome(
        value, {"x": dx, "y": dy, "scale": (w * scores).sum(), "bias": w.sum() if loss == "sigmoid" else None}
    )
    made = made.map(lambda name, result: result.float())
    assert_outcome(inputs, loss, "mean", made, rounded_product)
    with pytest.raises(AssertionError, match=r"error|root mean square"):
        assert_outcome(inputs, loss, "mean", made)


def _tf32(v: Tensor) -> Tensor:
    """Rounded to 11 significant bits."""
    mantissa, exponent = torch.frexp(v.double())
    return torch.ldexp(torch.round(torch.ldexp(mantissa, torch.tensor(11))), exponent - 11)
