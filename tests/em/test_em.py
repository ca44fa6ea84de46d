"""The loss over a data set: its gradients, its expectation over batches, its memory, and the family it contains."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import contrastive_kernels as ck

F64 = torch.float64


def features(n, m=None, d=5, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    rows = (torch.randn(k, d, generator=g, dtype=dtype) for k in (n, m or n))
    return [nn.functional.normalize(v, dim=1).requires_grad_() for v in rows]


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def exact_memory(loss, x, y, scale):
    """Stores every sample's mean over the whole data set."""
    n = len(x)
    z = (scale * x @ y.T).detach()
    masked = z.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    found = torch.stack([masked.logsumexp(1), masked.logsumexp(0)], 1) - math.log(n - 1)
    loss.memory.update(torch.arange(n), found[:, : loss.memory.directions])


def full_loss(x, y, scale):
    return ck.reference.clip_loss(x, y, scale)


# The gradient


@pytest.mark.parametrize("negatives", ["dataset", "batch", 7])
def test_the_whole_data_set_in_one_batch_is_info_nce(negatives):
    """Full batch, mean u, a right memory: value and gradient of InfoNCE, the temperature's included."""
    x, y = features(8)
    scale = torch.tensor(6.0, dtype=F64, requires_grad=True)
    loss = ck.DatasetContrastiveLoss(8, negatives=negatives)
    exact_memory(loss, x, y, scale)
    value = loss(x, y, torch.arange(8), scale)
    want = full_loss(x, y, scale)
    close(value, want)
    for a, b in zip(gradients(value, x, y, scale), gradients(want, x, y, scale)):
        close(a, b, 1e-6)


def test_the_mean_over_all_batches_is_the_gradient_of_the_whole():
    """Enumerated: unbiased from any batch size, where minibatch InfoNCE is not."""
    n, size, scale = 7, 3, 5.0
    x, y = features(n)
    loss = ck.DatasetContrastiveLoss(n).eval()
    exact_memory(loss, x, y, scale)
    want = gradients(full_loss(x, y, scale), x, y)
    batches = [torch.tensor(b) for b in itertools.combinations(range(n), size)]
    ours = [gradients(loss(x[b], y[b], b, scale), x, y) for b in batches]
    theirs = [gradients(ck.reference.clip_loss(x[b], y[b], scale), x, y) for b in batches]
    for k in (0, 1):
        close(torch.stack([g[k] for g in ours]).mean(0), want[k], 1e-6)
        bias = torch.stack([g[k] for g in theirs]).mean(0) - want[k]
        assert bias.norm() > 0.05 * want[k].norm()


def test_a_frozen_encoder_averages_to_the_whole():
    """step = 1: after a sweep over all batches every stored mean is the data set's."""
    n, size, scale = 6, 3, 4.0
    x, y = (v.detach() for v in features(n))
    loss = ck.DatasetContrastiveLoss(n, step=1.0, floor=0.0)
    for b in itertools.combinations(range(n), size):
        loss.warm_up(x[list(b)], y[list(b)], torch.tensor(b), scale)
    exact = ck.DatasetContrastiveLoss(n)
    exact_memory(exact, x, y, scale)
    close(loss.memory.log_mean, exact.memory.log_mean, 1e-6)
    assert (loss.memory.visits == math.comb(n - 1, size - 1)).all()


def test_gradients_of_similarities_sum_to_zero_for_any_u():
    z = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    loss = ck.DatasetContrastiveLoss(50, shape=0.7, directions=1, first_visit="reduce")
    loss.memory.update(torch.arange(6), torch.randn(6, 1))
    value = loss(z, torch.eye(6, dtype=F64), torch.arange(6), 1.0)
    (gradient,) = gradients(value, z)
    close(gradient.sum(1), torch.zeros(6, dtype=F64))
    assert gradient.abs().sum() > 0.1


def test_any_partition_of_rows_and_columns_gives_the_same_gradient():
    """Given u the loss is a sum over pairs; most blocks do not hold their rows' positives."""
    n, k, scale = 10, 12.0, 5.0
    x, y = features(n, seed=2)
    log_z = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=F64)
    whole = ck.decomposable(x, y, scale, log_z, positive_constant=0.0, negative_scale=k / (n - 1), reduction="sum")
    total, blocks = torch.zeros((), dtype=F64), 0
    for rows in (slice(0, 4), slice(4, 5), slice(5, 10)):
        for cols in (slice(0, 3), slice(3, 7), slice(7, 10)):
            own = torch.arange(n)[rows] - cols.start
            own = own.masked_fill((own < 0) | (own >= cols.stop - cols.start), -1)
            total = total + ck.decomposable(
                x[rows], y[cols], scale, log_z[rows], positive_constant=0.0, negative_scale=k / (n - 1),
                positive_logits=scale * (x[rows] * y[rows]).sum(1), positives=own, reduction="sum",
            )  # fmt: skip
            blocks += 1
    for a, b in zip(gradients(total, x, y), gradients(whole, x, y)):
        close(a, b)
    constants = (log_z - 1).sum()  # each block counts -log u - 1
    close(total - blocks / 3 * constants, whole - constants)


def test_drawn_variables_keep_value_and_gradient_in_the_mean():
    n, draws = 5, 2000
    x, y = features(n)
    loss = ck.DatasetContrastiveLoss(n, shape=2.0).eval()
    exact_memory(loss, x, y, 3.0)
    expected = full_loss(x, y, 3.0)
    generator = torch.Generator().manual_seed(4)
    values = torch.stack([loss(x, y, torch.arange(n), 3.0, generator=generator) for _ in range(draws)])
    error = values.std() / math.sqrt(draws)
    assert abs(values.mean() - expected) < 4 * error
    mean, want = gradients(values.mean(), x)[0], gradients(expected, x)[0]
    assert (mean - want).norm() < 0.05 * want.norm()


def test_a_generator_repeats_the_draws():
    x, y = features(5)
    loss = ck.DatasetContrastiveLoss(5, shape=1.0).eval()
    exact_memory(loss, x, y, 3.0)
    seeds = (7, 7, 8)
    a, b, c = (loss(x, y, torch.arange(5), 3.0, generator=torch.Generator().manual_seed(s)) for s in seeds)
    assert a == b != c


# The family


def own_normalizers(x, y, scale, constant, negatives):
    n = len(x)
    z = scale * x @ y.T
    h = (z - z.diagonal()[:, None]).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    return constant + negatives / (n - 1) * h.exp().sum(1)


def test_flat_nce_is_the_batch_s_own_normaliser_without_the_positive():
    """FlatNCE's gradient is that of log sum over negatives of exp(h)."""
    x, y = features(6)
    loss = ck.DatasetContrastiveLoss(20, weights="batch", include_positive=False, directions=1)
    want = own_normalizers(x, y, 4.0, 0.0, 19).log().mean()
    value = loss(x, y, torch.arange(6), 4.0)
    close(value, want)
    for a, b in zip(gradients(value, x, y), gradients(want, x, y)):
        close(a, b)


def test_the_batch_s_own_normaliser_gives_info_nce_and_its_bias():
    x, y = features(6)
    loss = ck.DatasetContrastiveLoss(20, weights="batch", negatives="batch")
    value, want = loss(x, y, torch.arange(6), 4.0), full_loss(x, y, 4.0)
    close(value, want)
    close(gradients(value, x)[0], gradients(want, x)[0])


def test_sogclr_has_the_current_batch_in_its_average():
    """dx of sum_i exp(h_ij) / U_i with U_i = (1 - g) U_i + g Z_i, the current Z_i included."""
    x, y = features(6)
    gain = 0.3
    loss = ck.DatasetContrastiveLoss(6, weights="updated", include_positive=False, floor=gain, directions=1)
    stored = torch.randn(6, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
    for _ in range(40):  # enough visits that the floor rules
        loss.memory.update(torch.arange(6), stored)
    z_pos = 4.0 * (x * y).sum(1).detach()
    means = own_normalizers(x, y, 4.0, 0.0, 1) / 1
    average = (1 - gain) * (stored[:, 0] - z_pos).exp() + gain * means.detach()
    want = (means / average).mean()
    value = loss(x, y, torch.arange(6), 4.0)
    close(gradients(value, x)[0], gradients(want, x)[0], 1e-6)
    close(loss.memory.log_mean[:, 0].double(), average.log() + z_pos, 1e-5)


def test_dcl_and_a_constant():
    x, y = features(6)
    dcl = ck.DatasetContrastiveLoss(6, include_positive=False, directions=1)
    exact_memory(dcl, x, y, 4.0)
    value, want = dcl(x, y, torch.arange(6), 4.0), own_normalizers(x, y, 4.0, 0.0, 5).log().mean()
    close(value, want, 1e-6)
    close(gradients(value, x)[0], gradients(want, x)[0], 1e-6)
    constant = ck.DatasetContrastiveLoss(6, weights=1.5, directions=1)  # NWJ: one u for all
    value = constant(x, y, torch.arange(6), 4.0)
    want = (math.exp(-1.5) * own_normalizers(x, y, 4.0, 1.0, 5) + 1.5 - 1).mean()
    close(value, want)
    close(gradients(value, x)[0], gradients(want, x)[0])


def test_a_queue_and_momentum_keys_train_the_query_alone():
    x, queue = features(4, 9)
    keys = features(4, seed=9)[0].detach()
    queue = queue.detach()
    loss = ck.DatasetContrastiveLoss(30, directions=2, negatives="batch")
    loss.memory.update(torch.arange(4), torch.full((4, 2), 0.5))
    before = loss.memory.log_mean.clone()
    z_pos = 3.0 * (x * keys).sum(1)
    value = loss(x, queue, torch.arange(4), 3.0, direction=1, positive_logits=z_pos)
    h = 3.0 * x @ queue.T - z_pos[:, None]
    z = 1 + h.exp().sum(1)
    log_z = torch.logaddexp(0.5 + math.log(9) - z_pos, torch.zeros(4, dtype=F64)).detach()
    want = (z * (-log_z).exp() + log_z - 1).mean()
    close(value, want, 1e-6)
    close(gradients(value, x)[0], gradients(want, x)[0], 1e-6)
    assert torch.equal(loss.memory.log_mean[:, 0], before[:, 0])
    assert (loss.memory.log_mean[:4, 1] != before[:4, 1]).all()
    together = loss(x, torch.cat([keys, queue]), torch.arange(4), 3.0, direction=1, positives=0)
    assert gradients(together, x)[0].abs().sum() > 0


# The bounds


def test_a_ratio_of_parts_never_binds_where_the_memory_is_right():
    n, scale = 12, 8.0
    x, y = features(n, d=2)
    plain, bounded = (ck.DatasetContrastiveLoss(n, max_ratio=r).eval() for r in (None, "partial sum"))
    for loss in (plain, bounded):
        exact_memory(loss, x, y, scale)
    for b in itertools.combinations(range(n), 3):
        b = torch.tensor(b)
        assert torch.equal(plain(x[b], y[b], b, scale), bounded(x[b], y[b], b, scale))
    for loss in (plain, bounded):  # stale: a thousand times too small
        loss.memory.log_mean -= 7
    b = torch.arange(3)
    stale, kept = (gradients(loss(x[b], y[b], b, scale), x)[0].norm() for loss in (plain, bounded))
    assert kept < stale / 3


def test_a_bounded_ratio_bounds_every_row():
    x, y = features(9, d=2)
    loss = ck.DatasetContrastiveLoss(9, max_ratio=3.0, include_positive=False, directions=1, reduction="none")
    loss.memory.update(torch.arange(9), torch.linspace(-9, 9, 9)[:, None])
    expectation = loss.e_step(torch.arange(9))
    value, found = loss.m_step(x, y, 8.0, expectation)
    ratio = (found[:, 0] - expectation.log_mean[:, 0]).exp()
    bounded = ratio.clamp(max=3.0)
    z_pos = 8.0 * (x * y).sum(1)
    log_z = found[:, 0] + math.log(8) - z_pos - bounded.log()
    close(value, bounded + log_z - 1, 1e-5)
    assert (ratio > 3).any() and (ratio < 3).any()


def test_the_safeguard_raises_what_a_part_of_the_sum_shows_to_be_too_low():
    n = 5
    x, y = (v.detach() for v in features(n))
    loss = ck.DatasetContrastiveLoss(n, safeguard=0.0, floor=0.0, directions=1)
    for _ in range(10):
        loss.memory.update(torch.arange(n), torch.full((n, 1), -20.0))
    loss(x, y, torch.arange(n), 2.0)
    exact = ck.DatasetContrastiveLoss(n, directions=1)
    exact_memory(exact, x, y, 2.0)
    close(loss.memory.log_mean, exact.memory.log_mean, 1e-5)


# First visits, hard batches


def test_first_visits():
    x, y = features(4)
    index = torch.tensor([0, 1, 2, 3])
    reduced = ck.DatasetContrastiveLoss(10)
    close(reduced(x, y, index, 3.0), ck.DatasetContrastiveLoss(10, weights="batch")(x, y, index, 3.0))
    skipped = ck.DatasetContrastiveLoss(10, first_visit="skip")
    value = skipped(x, y, index[:], 3.0)
    assert value == 0 and not any(g.any() for g in gradients(value, x, y))
    close(skipped.memory.log_mean, reduced.memory.log_mean)
    # two of four are new: the others have all the weight
    half = ck.DatasetContrastiveLoss(10, first_visit="skip").eval()
    half.memory.update(index[:2], torch.zeros(2, 2))
    known = ck.DatasetContrastiveLoss(10).eval()
    known.memory.update(index, torch.zeros(4, 2))
    close(half(x, y, index, 3.0), known(x, y, index, 3.0, weight=torch.tensor([1.0, 1, 0, 0])))


def test_a_batch_of_one_teaches_nothing():
    x, y = features(1)
    loss = ck.DatasetContrastiveLoss(10)
    scale, logits = torch.tensor(3.0, requires_grad=True), torch.ones(1, requires_grad=True)
    value = loss(x, y, torch.tensor([4]), scale)  # data parallelism wants a gradient of every parameter
    assert value == 0 and not any(g.any() for g in gradients(value, x, y, scale))
    value = loss(x, y[:0], torch.tensor([4]), scale, direction=0, positive_logits=logits)
    assert value == 0 and not any(g.any() for g in gradients(value, x, y, scale, logits))
    assert loss.memory.visits.sum() == 0
    empty = loss(x[:0], y[:0], torch.zeros(0, dtype=torch.int64), 3.0)
    assert empty == 0


def test_evaluation_leaves_the_memory_alone():
    x, y = features(4)
    loss = ck.DatasetContrastiveLoss(4)
    loss(x, y, torch.arange(4), 3.0)
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    loss.eval()(x, y, torch.arange(4), 9.0)
    assert all(torch.equal(v, state[k]) for k, v in loss.state_dict().items())


def test_checkpointing_neither_draws_nor_updates_twice():
    x, y = features(5)
    index = torch.arange(5)
    results = []
    for recompute in (False, True):
        loss = ck.DatasetContrastiveLoss(5, shape=1.0)
        loss.memory.update(index, torch.zeros(5, 2))
        expectation = loss.e_step(index, generator=torch.Generator().manual_seed(1))
        if recompute:
            value, found = checkpoint(loss.m_step, x, y, 3.0, expectation, use_reentrant=False)
        else:
            value, found = loss.m_step(x, y, 3.0, expectation)
        loss.update(expectation, found)
        results.append((value.detach(), *gradients(value, x, y), loss.memory.log_mean, loss.memory.visits))
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert (results[0][-1] == 2).all()
    loss = ck.DatasetContrastiveLoss(5)
    value = checkpoint(lambda: loss(x, y, index, 3.0), use_reentrant=False)
    with pytest.raises(RuntimeError, match="m_step"):
        value.backward()
    assert (loss.memory.visits == 1).all()


def test_compiled_m_step_is_the_eager_one():
    x, y = features(6, dtype=torch.float32)
    loss = ck.DatasetContrastiveLoss(6, backend="torch")
    loss(x, y, torch.arange(6), 3.0)
    expectation = loss.e_step(torch.arange(6))
    want, found = loss.m_step(x, y, 3.0, expectation)
    compiled = torch.compile(loss.m_step, fullgraph=True, backend="aot_eager")
    value, compiled_found = compiled(x, y, 3.0, expectation)
    close(value, want, 1e-6)
    close(compiled_found, found, 1e-6)
    close(gradients(value, x)[0], gradients(want, x)[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes_and_normalisation(dtype, normalize):
    x, y = (v.detach().to(dtype).requires_grad_() for v in features(6))
    unit = [nn.functional.normalize(v.double(), dim=1) if normalize else v.double() for v in (x, y)]
    loss = ck.DatasetContrastiveLoss(6, normalize=normalize)
    value = loss(x, y, torch.arange(6), 3.0)
    assert value.dtype == torch.float32
    close(value.double(), full_loss(*unit, 3.0), 0.02)
    value.backward()
    assert x.grad.dtype == dtype and loss.memory.log_mean.dtype == F64


def test_an_overflow_does_not_enter_the_memory():
    x, y = (v.detach() for v in features(4))
    loss = ck.DatasetContrastiveLoss(4)
    loss(x, y, torch.arange(4), 3.0)
    before = loss.memory.log_mean.clone()
    assert not loss(x * torch.tensor([1.0, torch.nan, 1, 1])[:, None], y, torch.arange(4), 3.0).isfinite()
    assert loss.memory.log_mean.isfinite().all() and (loss.memory.log_mean[1] == before[1]).any()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"negatives": "all"}, "negatives"),
        ({"negatives": 0}, "negatives"),
        ({"shape": 0.0}, "shape"),
        ({"weights": "mean"}, "weights"),
        ({"max_ratio": 0.5}, "max_ratio"),
        ({"max_ratio": "partial sum", "negatives": 5}, "max_ratio"),
        ({"safeguard": 1.0, "negatives": "batch"}, "safeguard"),
        ({"first_visit": "never"}, "first_visit"),
        ({"step": 2.0}, "step"),
        ({"floor": -0.1}, "floor"),
        ({"directions": 3}, "directions"),
        ({"reduction": "max"}, "reduction"),
        ({"storage": "somewhere", "device": "cuda"}, "storage"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        ck.DatasetContrastiveLoss(10, **options)


def test_wrong_arguments_are_named():
    x, y = features(4, 6)
    loss = ck.DatasetContrastiveLoss(10)
    with pytest.raises(ValueError, match="direction"):
        loss(x, y, torch.arange(4), 3.0)
    with pytest.raises(ValueError, match="index"):
        loss(x, y[:4], torch.arange(3), 3.0)
    with pytest.raises(ValueError, match=r"index.*\[0, 10\).*grow"):
        loss(x, y[:4], torch.tensor([0, 1, 2, 10]), 3.0)
    with pytest.raises(TypeError, match="index"):
        loss(x, y[:4], torch.arange(4.0), 3.0)
    with pytest.raises(ValueError, match="direction"):
        loss(x, y, torch.arange(4), 3.0, direction=2)
