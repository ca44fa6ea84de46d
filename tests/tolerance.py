"""The one rule by which a result is compared with the truth.

    err(ours) <= 2 * err(float32 torch) + floor

on the maximum and (with a quarter of the floor) on the root mean square, for the value and for every gradient. The
truth is ``reference.py`` in float64, of the inputs as rounded to the dtype under test. "float32 torch" is
``reference.py`` in float32 on the same inputs, upcast, with its gradients rounded to the dtype: what a careful person
would have without this package.

    floor = (8 * eps(dtype) + 4 * eps(scores) * scale * |x_i| |y_j|) * scale * max|y| * (the row's weight)

for dx, and accordingly for the rest. The row's weight is sum_j |w_ij|, w = dL/dz in float64 with the upstream gradient
in it: what scale * max|y| is multiplied by. The second term is the rounding of the logits themselves, each of which
carries it into exp(z): where few pairs decide, torch's error is one throw of that die, and ours is another. (To every
floor comes float32's smallest normal number: what is below it may be 0.)

Where rows are equal, a gradient is a sum of equal numbers, and additions of equal numbers round alike: errors do not
level out but add up, to anything between 0 and half a rounding of every partial sum. This too is one throw of a die,
decided by the last digits of w, and the same for all rows, so that the root mean square is as large as the maximum.
"Torch's errors" in such gradients are therefore at least half of that bound (which the rule doubles).

Tensor cores do not add in IEEE float32: after every 16 features they cut the sum off, toward zero. Over D features that
becomes a bias, and every product on that GPU has it. So where they multiply (16 bits, and float32 if torch allows TF32;
never IEEE float32 or float64), "torch's errors" are the larger of the above and those of the reference from the scores
that torch itself makes on the card, with float64 behind them (in TF32 the gradients' products are the card's too). The
floor stays as it is. test_tensor_cores.py tries the rule on simulated products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import labelled
import problems
import torch
from problems import Inputs, Outcome, Problem, make_inputs
from torch import Tensor

from contrastive_kernels import reference
from contrastive_kernels.reference import losses

#: Losses of one set of features, x and y together.
TWO_VIEWS = ("nt_xent", *labelled.ONE_SET)
#: Roundings of the largest contribution that every result may be off by.
UNITS = 8
#: Roundings of a logit, relative to |scale| |x_i| |y_j|.
LOGIT_UNITS = 4

#: (a, b) -> a b in float32, of matrices of one dtype on the CPU, multiplied by tensor cores.
Product = Callable[[Tensor, Tensor], Tensor]


#: Truths that are kept: tests run through backends and paths of one problem.
MOST = 32


@lru_cache(MOST)
def expected(problem: Problem, loss: str, dtype: torch.dtype, reduction: str) -> tuple[Outcome, Outcome]:
    """(the truth, the absolute errors of float32 torch with its gradients rounded to `dtype`).

    float64 torch is the truth itself: there, the errors are those of float32 on the same problem, as many times smaller
    as float64's rounding is.
    """
    truth = problems.run(reference, make_inputs(problem, dtype), loss, torch.float64, reduction=reduction)
    if dtype == torch.float64:
        _, errors = expected(problem, loss, torch.float32, reduction)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return truth, errors.map(lambda name, error: error * ratio)
    torch_result = problems.run(reference, make_inputs(problem, dtype), loss, torch.float32, reduction=reduction)
    rounded = torch_result.map(lambda name, result: result.to(dtype) if name in ("x", "y") else result)
    errors = rounded.map(lambda name, result: (result.double() - truth[name]).abs())
    alike = _rounded_alike(problem, loss, dtype, reduction, truth.value)
    return truth, errors.map(lambda name, error: torch.maximum(error, alike[name] / 2) if name in alike else error)


def _rounded_alike(problem: Problem, loss: str, dtype: torch.dtype, reduction: str, value: Tensor) -> dict[str, Tensor]:
    """What float32 sums of dx and dy may be off by because their summands are equal [N, 1], [M, 1]."""
    inputs = make_inputs(problem, dtype)
    x, y, scale = inputs.x.double(), inputs.y.double(), inputs.scale.double().abs()
    if loss in TWO_VIEWS:
        x = y = torch.cat([x, y])
    repeated_x, repeated_y = _repeated(x), _repeated(y)
    if not (len(x) and len(y) and (repeated_x.any() or repeated_y.any())):
        return {}
    w = _pair_weights(inputs, loss, reduction, problems.upstream_like(value, problem.seed))

    def bound(w: Tensor, other: Tensor, repeated: Tensor) -> Tensor:
        partial = torch.maximum(w.clamp(min=0).cumsum(1), (-w).clamp(min=0).cumsum(1))
        half = torch.finfo(inputs.scale.dtype).eps / 2
        return half * scale * other.abs().max() * (partial * repeated).sum(1)

    by_x, by_y = bound(w, y, repeated_y), bound(w.T, x, repeated_x)
    if loss in TWO_VIEWS:
        by_x, by_y = (by_x + by_y).view(2, -1)
    return {"x": by_x[:, None], "y": by_y[:, None]}


def _repeated(v: Tensor) -> Tensor:
    """Which rows are there more than once [n]."""
    if not len(v):
        return torch.zeros(0, dtype=torch.bool)
    _, inverse, counts = torch.unique(v, dim=0, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


@lru_cache(MOST)
def tensor_core_errors(problem: Problem, loss: str, dtype: torch.dtype, reduction: str, product: Product) -> Outcome:
    """The absolute errors of the reference from scores that `product` makes, with its gradients rounded to `dtype`."""
    inputs = make_inputs(problem, dtype)
    x, y, scale, bias = inputs.x, inputs.y, inputs.scale.double(), inputs.candidate_bias
    if loss in TWO_VIEWS:
        x = y = torch.cat([x, y])
    if bias is not None:
        bias = bias.double().requires_grad_()
        inputs = replace(inputs, candidate_bias=bias)

    def multiply(w: Tensor, v: Tensor) -> Tensor:
        return product(w.float(), v).double() if dtype == torch.float32 else w @ v.double()

    scores = product(x, y.T).double()
    value, w = from_scores(inputs, loss, reduction, scores)
    dx, dy = multiply(scale * w, y), multiply(scale * w.T, x)
    if loss in TWO_VIEWS:
        dx, dy = (dx + dy).chunk(2)
    gradients = {"x": dx.to(dtype), "y": dy.to(dtype), "scale": (w * scores).sum(), "bias": w.sum()}
    if bias is not None and bias.grad is not None:
        gradients["candidate_bias"] = bias.grad
    truth, _ = expected(problem, loss, dtype, reduction)
    there = {name: gradients[name] for name, wanted in truth.gradients.items() if wanted is not None}
    return Outcome(value, there).map(lambda name, result: (result.double() - truth[name]).abs())


def assert_outcome(inputs: Inputs, loss: str, reduction: str, ours: Outcome, product: Product | None = None) -> None:
    """Asserts the rule for the value and for every gradient there is; `product`: where tensor cores multiply."""
    dtype, score_dtype = inputs.x.dtype, inputs.scale.dtype
    truth, torch_errors = expected(inputs.problem, loss, dtype, reduction)
    yardsticks = [torch_errors]
    if product is not None:
        yardsticks.append(tensor_core_errors(inputs.problem, loss, dtype, reduction, product))
    allowed = floors(inputs.problem, loss, dtype, reduction)
    for name in ("value", *(name for name, gradient in ours.gradients.items() if gradient is not None)):
        wanted = dtype if name in ("x", "y") else score_dtype
        label = name if name == "value" else f"d{name}"
        assert ours[name].dtype == wanted, f"{label}: {ours[name].dtype}, expected {wanted}"
        assert_accurate(label, ours[name], truth[name], [errors[name] for errors in yardsticks], allowed[name])


#: float32's smallest normal number: what lies below may be 0 (docs/reliability.md).
SUBNORMAL = torch.finfo(torch.float32).tiny


def assert_accurate(name: str, ours: Tensor, truth: Tensor, torch_error: Tensor | list[Tensor], floor: Tensor) -> None:
    """Asserts the rule for one result.

    Parameters
    ----------
    name : str
        What is compared, for the message.
    ours : Tensor
        The result, in any dtype.
    truth : Tensor
        The same in float64.
    torch_error : Tensor or list of Tensor
        float32 torch's absolute error in the same; of several, the largest maximum and root mean square count.
    floor : Tensor
        The floor in absolute terms; it broadcasts against ``ours``, so that every row has its own.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    finite = ours.isfinite()
    assert finite.all(), f"{name}: {int((~finite).sum())} of {ours.numel()} entries are not finite"
    if not ours.numel():
        return
    error, floor = (ours.double() - truth).abs(), floor.expand_as(truth) + SUBNORMAL
    torch_errors = [torch_error] if isinstance(torch_error, Tensor) else torch_error
    largest, largest_rms = max(float(e.max()) for e in torch_errors), max(map(rms, torch_errors))
    allowed = 2 * largest + floor
    worst = (error / allowed.clamp(min=torch.finfo(torch.float64).tiny)).argmax()
    at = tuple(int(i) for i in torch.unravel_index(worst, error.shape)) if error.dim() else ()
    assert (error <= allowed).all(), (
        f"{name}{list(at) if at else ''}: got {ours[at].item():.9g}, expected {truth[at].item():.9g}; error "
        f"{error[at].item():.3g} > {allowed[at].item():.3g} = 2 * {largest:.3g} (torch's largest) "
        f"+ {floor[at].item():.3g}"
    )
    allowed_rms = 2 * largest_rms + rms(floor) / 4
    assert rms(error) <= allowed_rms, (
        f"{name}: root mean square of the error {rms(error):.3g} > {allowed_rms:.3g} "
        f"= 2 * {largest_rms:.3g} (torch's) + {rms(floor) / 4:.3g}"
    )


@lru_cache(MOST)
def floors(problem: Problem, loss: str, dtype: torch.dtype, reduction: str) -> dict[str, Tensor]:
    """The rule's floor for the value and for each gradient."""
    inputs = make_inputs(problem, dtype)
    x, y, scale = inputs.x.double(), inputs.y.double(), inputs.scale.double().abs()
    two_way = loss in ("clip_loss", "decomposable_pair", *TWO_VIEWS)
    if loss in TWO_VIEWS:
        x = y = torch.cat([x, y])
    score_eps, eps = torch.finfo(inputs.scale.dtype).eps, torch.finfo(dtype).eps
    value = expected(problem, loss, dtype, reduction)[0].value
    upstream = problems.upstream_like(value, problem.seed)
    w, w_of_value = (_pair_weights(inputs, loss, reduction, g).abs() for g in (upstream, torch.ones_like(value)))
    logit_rounding = LOGIT_UNITS * score_eps * scale * x.norm(dim=1)[:, None] * y.norm(dim=1)
    # what is added to a logit before its exponential rounds it too
    if loss == "sigmoid":
        logit_rounding = logit_rounding + LOGIT_UNITS * score_eps * inputs.bias.double().abs()
    elif loss in problems.DECOMPOSABLE:
        added = torch.cat(inputs.log_normalizer).double().abs().max() if len(x) else 0.0
        logit_rounding = logit_rounding + LOGIT_UNITS * score_eps * added
    if inputs.candidate_bias is not None and inputs.candidate_bias.numel():
        largest = inputs.candidate_bias.nan_to_num(neginf=0.0).abs().max().double()
        logit_rounding = logit_rounding + LOGIT_UNITS * score_eps * largest

    def contributions(size: float) -> Tensor:
        """|w| times the roundings it carries [N, M], for results whose own rounding is `size`."""
        return w * (UNITS * size + logit_rounding)

    of_value = w_of_value * logit_rounding
    rows = of_value.sum(1) + (of_value.sum(0) if two_way else 0.0)
    of_result = value.abs()
    if loss.startswith("decomposable"):  # the value is a small difference of uZ, log u and 1
        of_result = of_result + (1.0 if inputs.weight is None or not len(x) else inputs.weight.double().max())
    by_x, by_y = contributions(eps).sum(1), contributions(eps).sum(0)
    of_candidates = by_y if loss != "clip_loss" else by_x + by_y  # the candidates of both directions
    if loss in TWO_VIEWS:
        # row i of either view, as an anchor and as a candidate
        of_candidates = by_y.view(2, -1).sum(0)
        by_x, by_y = (by_x + by_y).view(2, -1)
        rows = rows.view(2, -1).sum(0).repeat(2)
    largest = (x.abs().max(), y.abs().max()) if len(x) and len(y) else (0.0, 0.0)
    scores = x @ y.T
    of_scale = (contributions(score_eps) * scores.abs()).sum()
    if loss != "sigmoid" and inputs.positive_logits is None and scores.numel():
        # the weights of a row sum to 0, so that what all scores have in common counts only by its rounding
        centered = (scores - scores.mean()).abs()
        rounding = w * LOGIT_UNITS * score_eps * x.norm(dim=1)[:, None] * y.norm(dim=1)
        of_scale = torch.minimum(of_scale, (contributions(score_eps) * centered + rounding).sum())
    return {
        "value": (rows if reduction == "none" else rows.sum()) + UNITS * score_eps * of_result,
        "x": (scale * largest[1] * by_x)[:, None],
        "y": (scale * largest[0] * by_y)[:, None],
        "scale": of_scale,
        "bias": contributions(score_eps).sum(),
        "candidate_bias": of_candidates,
    }


def _pair_weights(inputs: Inputs, loss: str, reduction: str, upstream: Tensor) -> Tensor:
    """w = dL/dz in float64 [N, M] ([2N, 2N] of two views): the reference's gradient to the logits themselves."""
    x, y = inputs.x.double(), inputs.y.double()
    if loss in TWO_VIEWS:
        x = y = torch.cat([x, y])
    return from_scores(inputs, loss, reduction, x @ y.T, upstream)[1]


def from_scores(
    inputs: Inputs, loss: str, reduction: str, scores: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference's value and w = dL/dz, from dot products [N, M] ([2N, 2N] of two views) in float64."""
    weight, z = inputs.weight, inputs.scale.double() * scores
    if loss == "nt_xent":  # InfoNCE among the views, whose scores with themselves are as good as -inf
        weight = None if weight is None else weight.repeat(2)
        z.fill_diagonal_(-1e30)
    z.requires_grad_()
    itself = torch.eye(z.shape[1], dtype=torch.float64)
    if loss in labelled.ONE_SET:
        value = labelled.of_logits(inputs, loss, z, reduction)
    elif loss == "nt_xent" and inputs.problem.label_smoothing:  # by its own mask: all candidates count alike
        value = _smoothed_nt_xent(inputs, z, weight, reduction)
    elif loss == "nt_xent":
        positives = torch.arange(len(z)).roll(len(z) // 2)
        ids = None if inputs.ids is None else inputs.ids[0].repeat(2)
        bias = None if inputs.candidate_bias is None else inputs.candidate_bias.double().repeat(2)
        options = {"positives": positives, "ids": ids, "candidate_bias": bias, "weight": weight}
        options |= {"include_positive": inputs.problem.include_positive, "margin": inputs.margin, **inputs.guide}
        if inputs.guide:
            options["guided"] = (torch.cat(inputs.guide["guided"]),) * 2
        value = reference.info_nce(z, itself, 1.0, **options, reduction=reduction)
    else:
        value = inputs.call(reference, loss, z, itself, 1.0, inputs.bias.double(), reduction=reduction)
    value.backward(problems.upstream_like(value, inputs.problem.seed) if upstream is None else upstream)
    return value.detach(), z.grad


def _smoothed_nt_xent(inputs: Inputs, z: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """NT-Xent of logits [2N, 2N], of views whose logits with themselves are none."""
    alike = None if inputs.ids is None else losses._alike(inputs.ids[0].repeat(2))
    z = z.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    positives = torch.arange(len(z)).roll(len(z) // 2)
    rows = losses._softmax_losses(z, positives, alike, True, inputs.problem.label_smoothing)
    return losses._reduce(rows, weight, reduction)


def rms(error: Tensor) -> float:
    """Root mean square."""
    return error.square().mean().sqrt().item()
