"""Peak memory: bounded by the workspace, whatever the batch size; measured by the kernel, in a process apart."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from thorough import LONG, THOROUGH, every, one_of

import contrastive_kernels as ck

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory and resets it"
)

MIB = 2**20
WORKSPACE = 16 * MIB
#: What is not in the workspace: vectors of the batch's length, a thread's buffers, the BLAS library's own.
SLACK = 6 * MIB

#: For each measurement, prints the peak of resident memory during forward and backward beyond what was there before,
#: without the gradients.
PROGRAM = """
import json, sys
import torch
import contrastive_kernels as ck

torch.set_num_threads(2)

def resident(field):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields[field].split()[0]) * 1024

def measure(loss, backend, dtype, n, d, workspace_bytes, work):
    loss, _, members = loss.partition(" with ")
    x, y = (torch.randn(n, d).to(getattr(torch, dtype)).requires_grad_(work != "forward") for _ in range(2))
    more = {"sigmoid": (-1.0,), "decomposable": (torch.zeros(n),)}.get(loss, ())
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    options = dict(backend=backend, workspace_bytes=workspace_bytes)
    if "ids" in members:
        options["ids"] = torch.arange(n) % (n // 3)
    if "smoothing" in members:
        options["label_smoothing"] = 0.1
    if "margin" in members:
        options["margin"] = -1.0
    if "guide" in members:
        options["guided"] = torch.randn(n, 8), torch.randn(n, 8)
    if "inside" in members:
        options["variant"] = "inside"
    if loss == "geometric_consistency":
        value = ck.geometric_consistency(x, y)
    elif loss == "uniformity":
        value = ck.feature_separation(x.detach(), y.detach(), x, y, None, None, 1.0, orthogonality=0.0, **options)
    elif loss == "retrieval_metrics":
        several = torch.arange(4 * n).view(n, 4) % n if members == "several" else None
        value = ck.retrieval_metrics(x, y, positives=several, **options)
    elif loss == "hardest_negatives":
        many = {"k": 10, "skip": 5, "margin": 0.5} if members == "many" else {}
        value = ck.hardest_negatives(x, y, **many, **options)
    elif loss in ("sup_con", "multi_positive_nce"):
        labels = torch.arange(n) % (n // 3)
        of_candidates = dict(y=y, y_labels=labels) if "candidates" in members else {}
        value = getattr(ck, loss)(x, labels, 1.0, **of_candidates, **options)
    elif loss == "matryoshka":
        value = ck.matryoshka(ck.clip_loss, (d // 2, d), normalize=True)(x, y, 1.0, **options)
    else:
        if "several" in members:
            options["positives"] = torch.arange(3 * n).view(n, 3) % n
        if "queue" in members:
            queue = options["queue"] = ck.FeatureQueue(n, d)
            queue.enqueue(torch.randn(n, d))
        if "features" in members:
            options["positive_features"] = torch.randn(n, d)
        if "hard" in members:
            options.update(hardness_beta=0.5, debiased=0.1)
        if "weighted" in members:
            options.update(weight_fn=ck.von_mises_fisher_weights, include_positive=False)
        scale = torch.ones(n, requires_grad=True) if "scales" in members else 1.0
        value = getattr(ck, loss)(x, y, scale, *more, **options)
    if work != "forward":
        value.backward()
    return resident("VmHWM") - before - sum(v.grad.nbytes for v in (x, y) if v.grad is not None)

for line in sys.stdin:
    loss, backend, dtype, n, d, workspace_bytes, work = json.loads(line)
    # libraries set up their own buffers, for panels too
    measure(loss, backend, dtype, 1100, d, workspace_bytes, work)
    print(measure(loss, backend, dtype, n, d, workspace_bytes, work), flush=True)
"""


@cache
def meter():
    """The process that measures, for all tests."""
    # an allocator that gives large blocks back at once: otherwise memory in use hides behind memory kept
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.kill)
    return process


def measured(*measurements):
    """Peak bytes beyond inputs and gradients of (loss, backend, dtype, n, d, workspace_bytes, work)."""
    reason = ck.why_not("cpu", torch.zeros(1, 1))
    if reason is not None:
        pytest.skip(reason)
    process, sizes = meter(), []
    for measurement in measurements:
        process.stdin.write(json.dumps(measurement) + "\n")
        process.stdin.flush()
        sizes.append(process.stdout.readline())
        assert sizes[-1], f"{measurement} ended with {process.wait()}; what it said is in stderr"
    return dict(zip(measurements, map(int, sizes)))


def test_the_workspace_is_the_bound():
    """N = 4096: the scores alone would take 64 MiB."""
    used = measured(
        *((loss, "cpu", "float32", 2048 if loss == "nt_xent" else 4096, 64, WORKSPACE, work)
          for loss in ("clip_loss", "nt_xent", "sigmoid", "decomposable") for work in ("forward", "gradients"))
    )  # fmt: skip
    over = {case: f"{size / MIB:.1f} MiB" for case, size in used.items() if size > WORKSPACE + SLACK}
    assert not over
    assert max(used.values()) > WORKSPACE / 4, "the measurement sees the workspace at all"


def test_ids_take_vectors_alone():
    """N = 4096, two of whose pairs in every row have equal ids: a mask would take 16 MiB, which has no room."""
    losses = [f"{loss} with ids" for loss in ("info_nce", "clip_loss", "sigmoid", "decomposable")]
    cases = [(loss, "cpu", "float32", 4096, 16, 4 * MIB, "gradients") for loss in losses]
    cases += [(losses[k], "torch", "float32", 4096, 16, 4 * MIB, "gradients") for k in (0, 2)[:: every(2)]]
    over = {case: f"{size / MIB:.1f} MiB" for case, size in measured(*cases).items() if size > 4 * MIB + SLACK}
    assert not over


def test_labels_take_vectors_and_sums_of_features():
    """N = 4096: a mask would take 16 MiB. Beside the workspace: sorted copies, sums in float64, gradients' sums."""
    losses = ("sup_con", "sup_con with candidates", "sup_con with inside", "info_nce with ids and smoothing")
    losses += ("multi_positive_nce", "multi_positive_nce with candidates")
    cases = [
        (loss, backend, "float32", 4096, 16, 4 * MIB, "gradients")
        for k, loss in enumerate(losses)
        for backend in one_of(k, ("cpu", "torch"))
    ]
    over = {case: f"{size / MIB:.1f} MiB" for case, size in measured(*cases).items() if size > 4 * MIB + 2 * SLACK}
    assert not over


#: Each, and by what its rows are divided.
MEMBERS = {
    "clip_loss with ids": 1,
    "clip_loss with smoothing": 1,
    "clip_loss with margin": 1,
    "clip_loss with scales": 1,
    "nt_xent with margin": 2,
    "info_nce with guide": 1,
    "clip_loss with guide": 1,
    "nt_xent with guide": 2,
    "sup_con": 1,
    "sup_con with inside": 1,
    "multi_positive_nce": 1,
    "info_nce with several": 1,
    "info_nce with queue and features": 1,  # the queue holds as many
    "info_nce with hard": 1,
    "info_nce with weighted": 1,
    "nt_xent with weighted": 2,
    "matryoshka": 1,
}


@pytest.mark.parametrize(
    "n, workspace_bytes",
    [(5_000, 4 * MIB), pytest.param(20_000, 64 * MIB, marks=pytest.mark.skipif(not THOROUGH, reason=LONG))],
)
def test_every_member_takes_little(n, workspace_bytes):
    """A matrix of scores alone would take 4 N^2: a quarter of that, 24 of 95 MiB and 381 MiB of 1.5 GiB."""
    cases = [(name, "cpu", "float32", n // k, 16, workspace_bytes, "gradients") for name, k in MEMBERS.items()]
    cases += [("hardest_negatives with many", "torch", "float32", n // 2, 16, workspace_bytes, "forward")]
    used = measured(*cases)
    most = dict.fromkeys(cases[:-1], n * n) | {cases[-1]: n * n // 4}
    over = {case: f"{used[case] / MIB:.1f} MiB" for case in cases if used[case] > most[case]}
    assert not over


def test_a_guide_stays_within_the_workspace():
    """N = 4096: its scores, copies of its blocks and masks are counted, in bands and in panels, of either backend."""
    cases = [
        (f"{loss} with guide", backend, dtype, 4096, 16, size * MIB, "gradients")
        for k, (loss, dtype, size) in enumerate(
            (
                ("info_nce", "float32", 40),
                ("info_nce", "bfloat16", 8),
                ("clip_loss", "float32", 8),
                ("nt_xent", "float32", 16),
            )
        )
        for backend in one_of(k, ("cpu", "torch"))
    ]
    over = {case: f"{size / MIB:.1f} MiB" for case, size in measured(*cases).items() if size > case[5] + SLACK}
    assert not over


def test_a_band_stays_within_the_workspace():
    """N = 8192: bands of 512 rows, 16 MiB of scores; what is kept for backward is as large as the gradients."""
    n, d = 8192, 64
    assert ck.plan(n, d=d, loss="info_nce", workspace_bytes=WORKSPACE).band == 512
    used = measured(*(("info_nce", "cpu", "float32", n, d, WORKSPACE, work) for work in ("forward", "gradients")))
    forward, gradients = used.values()
    assert forward <= WORKSPACE / 2, "without gradients there is no band"
    assert WORKSPACE / 2 < gradients <= WORKSPACE + SLACK


def test_wide_features_stay_within_the_bound():
    """Copies of blocks count; the float32 sums of one bfloat16 gradient are the only N x D beside the results."""
    n, d, workspace_bytes = 2560, 256, 8 * MIB  # 25 MiB of scores
    cases = [
        ("clip_loss", backend, dtype, n, d, workspace_bytes, "gradients")
        for backend in ("cpu", "torch")
        for dtype in ("float32", "bfloat16")
    ]
    used = measured(*cases)
    allowed = {case: workspace_bytes + SLACK + (4 * n * d if case[2] == "bfloat16" else 0) for case in cases}
    over = {case: f"{used[case] / MIB:.1f} MiB" for case in cases if used[case] > allowed[case]}
    assert not over


def test_memory_grows_with_the_number_of_rows_not_its_square():
    """Beside the workspace 100 bytes a row and a MiB; N = 12,288: a byte a score would take 144 MiB."""
    n = 12_288
    (used,) = measured(("clip_loss", "cpu", "float32", n, 16, 4 * MIB, "gradients")).values()
    assert used <= 5 * MIB + 100 * n, f"{used / MIB:.1f} MiB"


def test_searches_stay_within_the_workspace():
    """N = 3072: 36 MiB of scores, and vectors of a few bytes per row beside the workspace."""
    cases = [
        (search, backend, "float32", 3072, 32, WORKSPACE, "forward")
        for k, search in enumerate(("sample_negatives", "hardest_negatives", "retrieval_metrics"))
        for backend in one_of(k, ("torch", "cpu"))
    ]
    cases += [(search, "torch", "float32", 3072, 32, WORKSPACE, "forward")
              for search in ("hardest_negatives with many", "retrieval_metrics with several")]  # fmt: skip
    over = {case: f"{size / MIB:.1f} MiB" for case, size in measured(*cases).items() if size > WORKSPACE + SLACK}
    assert not over


def test_structures_have_no_table_of_pairs():
    """N = 8192: a table of N x N would take 256 MiB; A, B and a few temporaries of N x D take 2 MiB each."""
    n, d = 8192, 64
    used = measured(
        ("geometric_consistency", "cpu", "float32", n, d, WORKSPACE, "gradients"),
        ("uniformity", "cpu", "float32", n, d, WORKSPACE, "gradients"),
    )
    geometry, uniformity = used.values()
    assert geometry < 8 * 4 * n * d + SLACK
    # both modalities' gradients are summed before they leave
    assert uniformity < WORKSPACE + SLACK + 4 * 4 * n * d
