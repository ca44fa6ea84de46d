"""The memory by itself: its averages, duplicates, growth, storage, size, and what it tells."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch

import contrastive_kernels as ck


def column(*values):
    return torch.tensor(values)[:, None]


def memory_of_one(**options):
    return ck.NormalizerMemory(10, directions=1, **options)


def test_averages_are_of_the_means_and_not_of_their_logarithms():
    generator = torch.Generator().manual_seed(0)
    found = 3 * torch.randn(20, 4, 2, generator=generator)
    index = torch.tensor([9, 0, 5, 3])
    memory = ck.NormalizerMemory(10, step=1.0)
    for values in found:
        memory.update(index, values)
    torch.testing.assert_close(memory.read(index)[0], found.double().logsumexp(0) - math.log(20))
    assert (memory.read(index)[1] == 20).all() and memory.visits.sum() == 160


@pytest.mark.parametrize("step, floor", [(0.6, 0.0), (1.0, 0.3), (0.8, 0.9)])
def test_the_step_rule(step, floor):
    memory = memory_of_one(step=step, floor=floor)
    index, want = torch.tensor([4]), 0.0
    for visit, value in enumerate((5.0, 1.0, 3.0, 0.5, 8.0, 2.0), 1):
        gain = max(visit**-step, floor)
        want = (1 - gain) * want + gain * value
        memory.update(index, column(value).log())
        torch.testing.assert_close(memory.read(index)[0].exp().item(), want, rtol=1e-6, atol=0)


def test_the_average_survives_a_thousand_nats():
    memory = memory_of_one(floor=0.5)
    index = torch.tensor([0])
    for value in (-500.0, 500.0, 500.0, -500.0):
        memory.update(index, column(value))
    torch.testing.assert_close(memory.read(index)[0].item(), 500 + math.log(0.75 / 2), rtol=1e-6, atol=0)


def test_of_duplicates_the_last_row_counts_as_one_visit():
    memory = memory_of_one()
    index = torch.tensor([7, 2, 7, 2, 7, 1])
    memory.update(index, column(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert memory.read(torch.tensor([7, 2, 1]))[0].flatten().tolist() == [5.0, 4.0, 6.0]
    assert memory.read(torch.tensor([7, 2, 1, 0]))[1].flatten().tolist() == [1, 1, 1, 0]
    assert memory.unvisited.tolist() == [7]
    memory.update(torch.tensor([7, 7]), column(torch.inf, 9.0))
    assert memory.visits[7] == 2
    memory.update(torch.tensor([7, 7]), column(9.0, torch.inf))  # the last row counts, and it says nothing
    assert memory.visits[7] == 2


def test_an_index_with_gaps_warns_of_nothing(recwarn):
    """torch says once in a process that a search in such a tensor is slow."""
    torch.set_warn_always(True)
    try:
        memory_of_one().update(torch.arange(8)[::2], column(1.0, 2.0, 3.0, 4.0))
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_what_is_not_finite_does_not_enter():
    memory = ck.NormalizerMemory(3)
    memory.update(torch.arange(3), torch.zeros(3, 2))
    memory.update(torch.arange(3), torch.tensor([[torch.nan, 1.0], [-torch.inf, torch.inf], [1.0, 1.0]]))
    assert memory.visits.tolist() == [[1, 2], [1, 1], [2, 2]]
    assert memory.log_mean.isfinite().all() and memory.log_mean[0, 0] == 0


def test_cold_until_every_sample_was_met():
    memory = ck.NormalizerMemory(4)
    for index in ([0, 1], [1, 2], [2, 2]):
        memory.update(torch.tensor(index), torch.zeros(2, 2))
        assert memory.cold
    memory.update(torch.tensor([3]), torch.zeros(1, 1), direction=0)
    assert memory.cold and memory.unvisited.tolist() == [0, 1]
    memory.update(torch.tensor([3]), torch.zeros(1, 1), direction=1)
    assert not memory.cold
    memory.grow(6)
    assert memory.cold and memory.unvisited.tolist() == [2, 2]
    memory.update(torch.tensor([4, 5]), torch.ones(2, 2))
    assert not memory.cold
    assert memory.read(torch.tensor([0, 5]))[0].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="num_samples"):
        memory.grow(5)


def test_a_state_dict_restores_everything():
    memory = ck.NormalizerMemory(5, step=0.7, floor=0.2)
    memory.update(torch.arange(5), torch.randn(5, 2))
    memory.update(torch.arange(3), torch.randn(3, 2))
    stored = io.BytesIO()
    torch.save(memory.state_dict(), stored)
    stored.seek(0)
    other = ck.NormalizerMemory(5, step=0.7, floor=0.2)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert not other.cold and other.statistics() == memory.statistics()
    for one in (other, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        found = torch.full((5, 2), 0.3)
        one.update(torch.arange(5), found)
    memory.update(torch.arange(5), found)
    assert torch.equal(one.log_mean, memory.log_mean) and torch.equal(other.log_mean, memory.log_mean)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ck.NormalizerMemory(6).load_state_dict(memory.state_dict())


def test_a_hundred_million_samples_take_what_the_documentation_says():
    memory = ck.NormalizerMemory(10**8, device="meta")
    assert memory.log_mean.nbytes == 1_600_000_000 and memory.visits.nbytes == 800_000_000
    assert sum(v.nbytes for v in memory.state_dict().values()) < 2_400_001_000


def test_statistics_tell_how_far_the_state_lags():
    memory = ck.NormalizerMemory(1000, directions=1, step=1.0)
    assert math.isnan(memory.statistics().log_ratio[0]) and memory.statistics().visited == 0
    index = torch.arange(1000)
    memory.update(index, torch.zeros(1000, 1))
    generator = torch.Generator().manual_seed(0)
    memory.update(index, 2.0 + 0.5 * torch.randn(1000, 1, generator=generator))
    told = memory.statistics()
    assert (told.samples, told.visited, told.mean_visits) == (1000, 1000, 2.0)
    assert abs(told.log_ratio[0] - 2.0) < 0.05 and abs(told.log_ratio_std[0] - 0.5) < 0.05
    assert abs(told.effective[0] - math.exp(-0.25)) < 0.05  # of log-normal ratios
    assert 3.0 < told.largest[0] < 4.5
    quiet = memory.running.clone()
    memory.update(torch.arange(0), torch.zeros(0, 1))
    assert torch.equal(memory.running, quiet)


def test_no_step_waits_for_the_host():
    """On a meta tensor every synchronisation raises."""
    memory = ck.NormalizerMemory(100, device="meta")
    index = torch.arange(4, device="meta")
    memory.update(index, torch.zeros(4, 2, device="meta"), lower_bound=torch.zeros(4, 2, device="meta"))
    memory.read(index)
    assert memory.cold
    with pytest.raises(RuntimeError, match="meta tensor"):
        bool(memory.unvisited.any())


def test_rescaling_comes_nearer_to_a_moved_temperature():
    n = 200
    generator = torch.Generator().manual_seed(0)
    similarities = torch.tanh(0.5 * torch.randn(n, n, generator=generator))
    old, new = (torch.logsumexp(s * similarities, 1)[:, None] - math.log(n) for s in (10.0, 12.0))
    memory = ck.NormalizerMemory(n, directions=1)
    memory.update(torch.arange(n), old)
    memory.rescale(torch.tensor(1.2))
    assert ((memory.log_mean < new) & (memory.log_mean > old)).all()
    assert (new - memory.log_mean).mean() < 0.6 * (new - old).mean()
    assert (new - memory.log_mean).std() < (new - old).std()


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf, torch.tensor(math.nan)])
def test_a_ratio_that_would_spoil_the_memory_is_refused(ratio):
    memory = memory_of_one()
    memory.update(torch.arange(10), torch.ones(10, 1))
    with pytest.raises(ValueError, match="ratio"):
        memory.rescale(ratio)
    assert (memory.log_mean == 1).all()


def test_the_batch_is_moved_to_the_memory_and_back():
    memory = ck.NormalizerMemory(10)
    memory.update(torch.arange(2), torch.ones(2, 2, dtype=torch.float16))
    assert memory.read(torch.arange(2))[0].dtype == torch.float64


def test_digits_of_large_logits_are_kept():
    """A float32 of 1e4 is rounded to 1e-3; the weights of the rows are its exponentials."""
    memory = memory_of_one()
    for value in (1e4 + 0.3, 1e4 + 0.7001):
        memory.update(torch.tensor([2]), column(torch.tensor(value, dtype=torch.float64)))
    want = 1e4 + math.log((math.exp(0.3) + math.exp(0.7001)) / 2)
    assert abs(memory.read(torch.tensor([2]))[0].item() - want) < 1e-10


def test_what_was_spoilt_from_outside_starts_anew():
    memory = memory_of_one()
    memory.update(torch.arange(3), column(1.0, 1.0, 1.0))
    memory.log_mean[1] = torch.nan
    memory.update(torch.arange(3), column(3.0, 3.0, torch.nan))
    assert memory.log_mean[1] == 3 and memory.visits[:3, 0].tolist() == [2, 1, 1]
    assert memory.unvisited.tolist() == [7] and memory.running.isfinite().all()


def test_threads_take_turns():
    memory, index = memory_of_one(), torch.arange(10)

    def visit():
        for _ in range(100):
            memory.update(index, torch.zeros(10, 1))
            assert (memory.read(index)[1] > 0).all()

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    memory.grow(12)
    for thread in threads:
        thread.join()
    assert (memory.visits[:10] == 600).all() and memory.unvisited.tolist() == [2]


def test_accumulation_is_refused_in_a_group_of_processes(monkeypatch):
    """It encodes one micro-batch after the other, of this process alone."""
    loss, encoded = ck.DatasetContrastiveLoss(4), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="process group of 2"):
        loss.accumulate(encoded.append, [0], [torch.arange(4)], 1.0)
    assert loss.memory.visits.sum() == 0 and not encoded


@pytest.mark.parametrize(
    "index, found, error, named",
    [
        (torch.tensor([10]), torch.zeros(1, 2), ValueError, "index"),
        (torch.tensor([-1]), torch.zeros(1, 2), ValueError, "index"),
        (torch.tensor([1], dtype=torch.int32), torch.zeros(1, 2), TypeError, "index"),
        (torch.tensor([[1]]), torch.zeros(1, 2), ValueError, "index"),
        ([1], torch.zeros(1, 2), TypeError, "index"),
        (torch.tensor([1]), torch.zeros(1), ValueError, "found"),
        (torch.tensor([1]), torch.zeros(2, 2), ValueError, "found"),
        (torch.tensor([1]), [0.0, 0.0], TypeError, "found"),
    ],
)
def test_wrong_updates_are_named(index, found, error, named):
    memory = ck.NormalizerMemory(10)
    with pytest.raises(error, match=named):
        memory.update(index, found)
    assert memory.visits.sum() == 0


@pytest.mark.parametrize("samples, error", [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_wrong_sizes_are_named(samples, error):
    with pytest.raises(error, match="num_samples"):
        ck.NormalizerMemory(samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_neither_waits_nor_depends_on_the_order_of_duplicates():
    memory, on_cpu = ck.NormalizerMemory(50, device="cuda"), ck.NormalizerMemory(50)
    index = torch.randint(0, 50, (200,))
    found = torch.randn(200, 2)
    on_device = index.cuda(), found.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.update(*on_device)
        memory.read(on_device[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu.update(index, found)
    torch.testing.assert_close(memory.log_mean.cpu(), on_cpu.log_mean)
    assert torch.equal(memory.visits.cpu(), on_cpu.visits)
