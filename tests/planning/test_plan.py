"""What would run, and how large panels are: arithmetic that needs no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import roofline
import torch
from paths import PATHS, path_options, walked
from problems import CPU_BACKENDS, PROBLEMS, SOFTMAX, make_inputs

import contrastive_kernels as ck
from contrastive_kernels.backends import cpu, cuda, registry
from contrastive_kernels.engine import strategy
from contrastive_kernels.engine.overlap import Overlap
from contrastive_kernels.panels import size as sizes
from contrastive_kernels.panels.size import PanelBytes, blocks_of, square_side, wave_shape
from contrastive_kernels.planning.costs import LOSSES

MIB = 2**20
TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("n, m", [(1, 1), (65, 65), (1000, 3), (65536, 65536), (70000, 70000), (1_000_000, 512)])
@pytest.mark.parametrize("workspace", [4 * MIB, 64 * MIB])
@pytest.mark.parametrize("products", [0, 2])
def test_wave_shapes_fit_and_are_balanced(n, m, workspace, products):
    size = PanelBytes(2.25, 4 * 512.0, 0.0)
    rows, cols = wave_shape(n, m, 512, size, workspace, 132, products, False)
    assert size.of(rows, cols) <= workspace
    for length, side in ((n, rows), (m, cols)):
        assert side % 64 == 0
        count = blocks_of(length, side)
        assert side == 64 or side - blocks_of(length, count) < 64, "blocks are of nearly equal size"


def test_wave_shapes_weigh_both_sides():
    """Thin panels spend their time on one side's sums; an H100's are squarish, and of whole waves."""
    size = PanelBytes(2.25, 4 * 768.0, 0.0)
    rows, cols = wave_shape(65536, 65536, 768, size, 64 * MIB, 132, 2, False)
    assert 1 / 2 <= rows / cols <= 2
    assert size.of(rows, cols) > 0.75 * 64 * MIB
    for side in (rows, cols):
        tiles = blocks_of(side, 128) * blocks_of(768, 256)
        assert tiles / (132 * blocks_of(tiles, 132)) > 0.7, "the gradient products' last wave is mostly full"


def test_wave_shapes_of_a_symmetric_matrix_are_square_and_several():
    rows, cols = wave_shape(65536, 65536, 512, PanelBytes(0.25, 16.0, 16.0), 64 * MIB, 132, 0, True)
    assert rows == cols
    assert blocks_of(65536, rows) >= 4, "one panel would multiply both halves"


def test_smallest_panels():
    size = PanelBytes(8.0, 100.0, 0.0)
    smallest = size.of(64, 64)
    assert wave_shape(1000, 1000, 64, size, smallest, 132, 2, False) == (64, 64)
    assert wave_shape(1000, 1000, 64, size, smallest - 1, 132, 2, False) is None
    assert square_side(1000, 1000, size, smallest) == 64
    assert square_side(1000, 1000, size, smallest - 1) is None


def test_squares_of_a_cpu_stay_in_cache():
    size = PanelBytes(4.0, 0.0, 0.0)
    assert square_side(8192, 8192, size, 64 * MIB) == 1024
    assert square_side(1025, 10, size, 64 * MIB) == 576  # two blocks of nearly equal size
    assert square_side(0, 0, size, 64 * MIB) == 64


@pytest.mark.parametrize("loss", ["info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plan_for_a_gpu_that_is_not_here(loss, dtype):
    plan = ck.plan(20000, None, 768, dtype, "cuda", loss, capability=90)
    spec = LOSSES[loss]
    assert plan.band is None and plan.products == spec.products
    assert len(plan.passes) == spec.passes
    assert plan.workspace_bytes <= 512 * MIB
    assert set(plan.reasons) == set(ck.list_backends())
    assert plan.reasons[plan.backend] is None
    assert plan.passes[-1].name == "weigh" and plan.passes[-1].panel[0] >= 1024
    text = str(plan)
    assert "9.0" in text and plan.backend in text and f"{plan.passes[0].panels} panel" in text


def test_plan_says_why_not():
    plan = ck.plan(1000, device="cuda", capability=75)
    assert "8.0" in plan.reasons["triton"] and "CPU" in plan.reasons["cpu"]
    with pytest.raises(ValueError, match=r"'triton' cannot serve .*8\.0"):
        ck.plan(1000, device="cuda", capability=75, backend="triton")
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in ck.plan(1000, device="cuda").reasons["triton"]


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"n": 3.0}, TypeError, "n: expected an int; got float"),
        ({"n": -1}, ValueError, "n: expected"),
        ({"n": 4, "d": 0}, ValueError, "d: expected"),
        ({"n": 4, "dtype": torch.int32}, TypeError, "dtype: expected"),
        ({"n": 4, "loss": "triplet"}, ValueError, "loss: expected one of"),
        ({"n": 4, "m": 5}, ValueError, "m: expected as many as n"),
        ({"n": 4, "capability": 90}, ValueError, "capability: expected None"),
        ({"n": 4, "workspace_bytes": 1}, ValueError, "workspace_bytes: expected at least"),
        ({"n": 4, "backend": "fast"}, ValueError, "backend: expected"),
    ],
)
def test_plan_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        ck.plan(**arguments)


@pytest.mark.parametrize("n", [100, 2000])
def test_plan_counts_what_the_driver_does(n, monkeypatch):
    """Panels of either pass, bands and all."""
    counted = {"reduce": 0, "weigh": 0}
    kind = type(registry.get("torch"))
    for name, operation in (("reduce", kind.reduce_panel), ("weigh", kind.weight_panel)):

        def counting(self, term, panel, name=name, operation=operation):
            counted[name] += 1
            operation(self, term, panel)

        monkeypatch.setattr(kind, operation.__name__, counting)
    for loss, size in (("clip_loss", 4), ("nt_xent", 4), ("sigmoid", 4), ("info_nce", 4), ("info_nce", 32)):
        counted.update(reduce=0, weigh=0)
        x, y = (torch.randn(n, 8).requires_grad_() for _ in range(2))
        more = (-1.0,) if loss == "sigmoid" else ()
        getattr(ck, loss)(x, y, 1.0, *more, backend="torch", workspace_bytes=size * MIB).backward()
        plan = ck.plan(n, d=8, loss=loss, backend="torch", workspace_bytes=size * MIB)
        assert {each.name: each.panels for each in plan.passes} == {k: v for k, v in counted.items() if v}


class Recorded:
    """A CUDA stream or event that notes what it is told, and what has been told to it before."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "after", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits", event.name))

    def record(self, stream):
        self.log.append((stream.name, "records", self.name))


def test_overlap_takes_turns(monkeypatch):
    """A panel's products come after its weights; the weights of the next but one after those products."""
    log, names = [], iter(["made0", "made1", "used0", "used1"])
    current = []
    main, side = Recorded("main", log), Recorded("side", log)

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Recorded(next(names), log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    overlap = Overlap(torch.device("cuda"), True)
    for k in range(4):
        assert overlap.buffer == k % 2
        with overlap.making():
            log.append((current[-1].name, "weights", k))
        log.append(("main", "products", k))
        overlap.multiplied()
    for k in range(4):
        made, used = f"made{k % 2}", f"used{k % 2}"
        at = log.index(("side", "weights", k))
        assert log[at + 1 : at + 4] == [("side", "records", made), ("main", "waits", made), ("main", "products", k)]
        assert log[at + 4] == ("main", "records", used)
        assert (log[at - 1] == ("side", "waits", used)) == (k >= 2)


def test_documents_of_predictions_are_the_codes():
    for document, lines in ((roofline.DOCUMENT, roofline.table()), (roofline.NOTEBOOK, roofline.panels())):
        _, written, _ = roofline.split(document.read_text())
        assert written == lines, "python tests/roofline.py writes it anew"


@pytest.mark.parametrize("loss", ["clip_loss", "sigmoid", "nt_xent"])
def test_flop_and_bytes_of_a_plan(loss):
    """By hand, for whole panels of a bfloat16 problem on an H100."""
    plan = ck.plan(8192, d=256, dtype=torch.bfloat16, device="cuda", loss=loss, backend="triton", capability=90)
    weigh = plan.passes[-1]
    rows, cols = weigh.panel
    weights = 3 * 2 * rows * cols  # written, and read by two products
    operands = 2 * (2 * 256 * (rows + cols))  # bfloat16, for the scores and for the gradients
    sums = 2 * 4 * 256 * (rows + cols)  # float32, read and written
    assert weigh.bytes == weigh.panels * (weights + operands + sums)
    assert weigh.flop == 2 * 256 * plan.rows * plan.cols * (1.5 if loss == "nt_xent" else 3)
    assert weigh.launches == 6 * weigh.panels  # gains referred, two score kernels, a merge, two products


@pytest.mark.parametrize(
    ("d", "dtype", "capability", "route"),
    [
        (768, torch.bfloat16, 90, cuda.TENSOR_CORES),
        (768, torch.float16, 120, cuda.TENSOR_CORES),
        (765, torch.bfloat16, 90, cuda.PORTABLE),
        (768, torch.float16, 75, cuda.PORTABLE),
        (768, torch.float32, 90, cuda.PORTABLE),
    ],
)
def test_routes_of_the_cuda_backend(d, dtype, capability, route, monkeypatch):
    """Of a build for GPUs that are not here: their names, their launches, and a panel's bytes by hand."""
    built = types.SimpleNamespace(cuda_version=lambda: 13000, cuda_architectures=lambda: "75_80_90_90PTX")
    monkeypatch.setattr(cuda, "MISSING", None)
    monkeypatch.setattr(cuda, "_C", built, raising=False)
    plan = ck.plan(32768, d=d, dtype=dtype, device="cuda", backend="cuda", capability=capability)
    assert plan.route == route.name and f"yes, chosen: {route.name}" in str(plan)
    reduced, weighed = plan.passes
    in_memory = 0 if route is cuda.TENSOR_CORES else 1
    assert reduced.launches == (2 + in_memory) * reduced.panels
    assert weighed.launches == (4 + in_memory) * weighed.panels
    rows, cols = reduced.panel
    assert reduced.bytes == reduced.panels * ((rows + cols) * d * dtype.itemsize + in_memory * 2 * 4 * rows * cols)
    assert plan.workspace_bytes <= 512 * MIB
    assert rows * cols > (8 if route is cuda.PORTABLE else 100) * MIB, "scores take the workspace where they are stored"


def test_a_build_without_code_for_tensor_cores(monkeypatch):
    """PTX of an older architecture serves every GPU, by the portable route."""
    built = types.SimpleNamespace(cuda_version=lambda: 13000, cuda_architectures=lambda: "75_75PTX")
    monkeypatch.setattr(cuda, "MISSING", None)
    monkeypatch.setattr(cuda, "_C", built, raising=False)
    plan = ck.plan(4096, dtype=torch.float16, device="cuda", backend="cuda", capability=90)
    assert plan.route == cuda.PORTABLE.name


def test_routes_of_the_other_backends():
    assert ck.plan(100, dtype=torch.float64).route == "operations of torch"
    if ck.why_not("cpu", torch.zeros(1, 1)) is None:
        plan = ck.plan(100)
        assert plan.route == f"torch's matrix product + one pass in {cpu.instruction_set()}"
        assert f"cpu    yes, chosen: {plan.route}" in str(plan)
    pytest.importorskip("triton", reason="Triton is not installed")

    def route(dtype):
        return ck.plan(100, dtype=dtype, device="cuda", backend="triton", capability=90).route

    assert route(torch.bfloat16) == route(torch.float16) == "tensor cores"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, name in ((False, "float32 without tensor cores"), (True, "tensor cores, in TF32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert route(torch.float32) == name
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_exponentials_are_kept_where_it_saves_time():
    """Where the workspace is larger than usual: in bands whose products fill the GPU; of two sides, where all fit."""

    def band(n, m=None, d=768, loss="info_nce", dtype=torch.bfloat16, gib=1, **options):
        room = {"workspace_bytes": gib * 2**30} if gib else {}
        plan = ck.plan(n, m, d, dtype, "cuda", loss, backend="triton", capability=90, **room, **options)
        assert plan.workspace_bytes <= (gib or 0.5) * 2**30
        assert plan.products == LOSSES[loss].products - (plan.band is not None)
        return plan.band

    pytest.importorskip("triton", reason="Triton is not installed")
    assert band(65536, gib=None) is None and band(1000, gib=None) is None, "nobody has asked"
    assert band(65536) == band(65536, d=512) == 6592 and band(131072) == 3328
    assert band(131072, d=512) is None and band(262144) is None, "a product of 52, of 39 tiles for 132 multiprocessors"
    assert band(65536, d=256, gib=8) is None, "the pass in between takes longer than the product"
    assert band(1000, 200_000) == 1000 and band(1000, 2_000_000) is None
    assert band(65536, loss="clip_loss") is None and band(12288, loss="clip_loss") == 12288
    assert band(65536, loss="clip_loss", gib=11) == 65536
    assert band(4096, loss="nt_xent") is None and band(4096, dtype=torch.float16) is None
    assert band(4096, members=("margin",)) is None and band(4096, members=("ids",)) == 4096


def test_launches_are_those_of_the_plan():
    """Kernels and products counted in the interpreter, against the plan's arithmetic."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, str(TESTS / "interpreted.py"), "launches"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads(result.stdout)
    assert len(counts) >= 3
    for case, (planned, counted) in counts.items():
        assert planned == counted, case


@pytest.fixture
def gpus(monkeypatch):
    """Makes GPUs of these many GiB and multiprocessors be here; the last is the current one."""

    def install(*found):
        def properties(device):
            assert isinstance(device, int)
            asked.append(device)
            memory, count = found[device]
            return types.SimpleNamespace(total_memory=memory * 2**30, multi_processor_count=count)

        sizes._gpu_at.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: len(found) - 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        return asked

    asked = []
    yield install
    sizes._gpu_at.cache_clear()


def test_the_default_workspace_suits_the_device(gpus):
    """64 MiB; of a GPU 512 MiB or 1/64 of its memory; what is given goes first. A GPU is asked once."""
    if not torch.cuda.is_available():
        assert sizes.workspace_for(torch.device("cuda:0")) == sizes.workspace_for(torch.device("cuda")) == 512 * MIB
    for device in ("cpu", "meta", "mps"):
        assert sizes.workspace_for(torch.device(device)) == 64 * MIB
    asked = gpus((8, 40), (24, 128), (141, 132))
    for _ in range(2):
        for index, expected in ((0, 128), (1, 384), (2, 512), (None, 512)):
            device = torch.device("cuda") if index is None else torch.device("cuda", index)
            assert sizes.workspace_for(device) == expected * MIB
            assert sizes.workspace_for(device, 10) == 10
            assert sizes.workspace_for(device, here=False) == 512 * MIB
            assert sizes.multiprocessors(device) == (40, 128, 132, 132)[3 if index is None else index]
    assert asked == [0, 1, 2]


def test_a_plan_shows_the_default_workspace(gpus):
    def sizes_like(loss, n, **device):
        """Powers of two of MiB whose plan is that of the default."""
        problem = {"n": n, "d": 512, "loss": loss, "backend": "torch", **device}
        plan = ck.plan(**problem)
        return [2**k for k in range(4, 11) if ck.plan(**problem, workspace_bytes=2**k * MIB) == plan]

    assert sizes_like("info_nce", 20000)[0] == 64, "the smallest that holds a band of so many columns"
    assert sizes_like("info_nce", 40000)[-1] == 64, "the largest that does not"
    gpus((8, 40))
    assert sizes_like("clip_loss", 65536, device="cuda:0") == [128]
    assert sizes_like("clip_loss", 65536, device="cuda:0", capability=90) == [512], "another GPU"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_problems_meet_every_path(backend):
    """Every hard input of some size is walked in panels, in a band and in one call, as far as there are such ways."""
    if ck.why_not(backend, torch.zeros(1, 1)) is not None:
        pytest.skip("not installed")
    for problem in PROBLEMS:
        n, m = problem.n, problem.n if problem.m is None else problem.m
        if n * m <= 64**2:  # one panel
            continue
        inputs = make_inputs(problem, torch.float32)
        for loss in problem.losses:
            if loss == "sigmoid" and n != m:  # by ids: plan() has no words for them
                continue
            met, panels = set(), 0
            for path in PATHS:
                with walked(path):
                    options = path_options(inputs, loss, backend, path)
                    if options is not None:
                        plan = ck.plan(n, m, problem.d, loss=loss.removesuffix("_pair"), **options)
                        met.add(plan.place)
                        panels = max(panels, plan.passes[-1].panels)
            few = n * m * (4 if loss == "nt_xent" else 1) <= strategy.WHOLE_SCORES
            wanted = {"tile", *["whole"] * (backend == "cpu" and few), *["band"] * (loss in SOFTMAX)}
            assert met == wanted and panels > 1, (problem.name, loss, met, panels)
