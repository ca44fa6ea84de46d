"""Many calls: by six threads at once each result is what it is alone, and memory does not grow.

`make soak` is the long form: SOAK_CALLS calls in all, and more deaths in tests/em/test_storage_deaths.py.
"""

from __future__ import annotations

import gc
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import ALL, CPU_BACKENDS, Problem, engine_options, make_inputs, run

import contrastive_kernels as ck

#: 0: the short form.
CALLS = int(os.environ.get("SOAK_CALLS") or 0)
THREADS = 6
MIB = 2**20

PROBLEMS = (
    Problem("soak-small", "one call of the backend", n=33, d=24),
    Problem("soak-panels", "several panels", n=131, d=24, small_panels=True, weight="sparse"),
    Problem("soak-drawn", "u is drawn", n=65, d=24, decomposable=(("shape", 1.0),), losses=ALL[4:]),
)


def losses(dtype):
    """Calls without arguments that give value and gradients of every loss, problem, backend and reduction."""
    found = []
    for problem in PROBLEMS:
        inputs = make_inputs(problem, dtype)
        for loss in problem.losses:
            for backend in CPU_BACKENDS:
                if ck.why_not(backend, inputs.x, inputs.y) is not None:
                    continue
                options = engine_options(inputs, loss, backend)
                for reduction in ("mean", "none"):
                    found.append(partial(run, ck, inputs, loss, dtype, reduction=reduction, **options))
    return found


def searches(dtype):
    """The same of what has no gradients."""
    x, y = make_inputs(PROBLEMS[1], dtype).x, make_inputs(PROBLEMS[0], dtype).x
    everywhere = torch.arange(len(x)) % len(y)

    def sample():
        return ck.sample_negatives(x, y, 5.0, positives=everywhere, generator=torch.Generator().manual_seed(0))

    return [
        sample,
        lambda: ck.hardest_negatives(x, y, positives=everywhere),
        lambda: ck.retrieval_metrics(x, y, positives=everywhere).ranks,
    ]


def step_of_a_data_set(dtype):
    """A step with a memory of its own, and what that learned."""
    inputs = make_inputs(PROBLEMS[1], dtype)

    def step():
        loss = ck.DatasetContrastiveLoss(300, shape=1.0, weights="updated")
        x = inputs.x.detach().requires_grad_()
        value = loss(x, inputs.y, torch.arange(131), 5.0, generator=torch.Generator().manual_seed(0))
        value.backward()
        return torch.cat([value.detach()[None].double(), x.grad.double().flatten(), loss.memory.log_mean.flatten()])

    return [step]


def works(dtype):
    """All of them."""
    return [*losses(dtype), *searches(dtype), *step_of_a_data_set(dtype)]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    pairs = [(a.value, b.value), *((a[name], b[name]) for name in a.gradients)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_threads_do_not_meet(dtype, set_threads):
    """One dtype at a time: README, "Good to know", says what bfloat16 does to float32 of other threads."""
    team = 2 if CALLS else 1  # teams that wait for each other on few cores take minutes
    set_threads(team)
    todo = works(dtype)
    alone = [work() for work in todo]
    each = max(CALLS // (2 * THREADS), len(todo) // 2)
    start, wrong = threading.Barrier(THREADS), []

    def thread(number):
        try:
            torch.set_num_threads(team)
            start.wait()
            for k in range(each):
                at = (k * (2 * number + 1) + number) % len(todo)  # each in an order of its own
                if not equal(todo[at](), alone[at]):
                    wrong.append((number, k, at))
        except BaseException as error:
            wrong.append((number, repr(error)))
            raise

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(THREADS)]
    for each_thread in threads:
        each_thread.start()
    for each_thread in threads:
        each_thread.join()
    assert not wrong


def resident():
    """Bytes of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's memory")
def test_memory_does_not_grow():
    """A tensor of the batch that is kept by each call would be some kilobytes each."""
    todo = works(torch.float32)
    calls, most = max(CALLS, 4 * len(todo)), 2 * MIB

    def run_them(count):
        for k in range(count):
            todo[k % len(todo)]()
        gc.collect()
        return resident()

    before = run_them(calls // 4)  # what is cached is cached
    after = run_them(calls - calls // 4)
    assert after - before < most, f"{(after - before) / MIB:.1f} MiB in {calls - calls // 4} calls"
