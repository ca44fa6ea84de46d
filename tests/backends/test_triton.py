"""The Triton backend without a GPU: its kernels in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import contrastive_kernels as ck

pytest.importorskip("triton", reason="Triton is not installed")

import offline
import triton.testing
from thorough import THOROUGH, every

from contrastive_kernels._triton import configs, launch, persistent_launch, tuning, vector_launch
from contrastive_kernels.backends.triton import KEPT_PER_SCORE, SCRATCH_PER_ROW, SCRATCH_PER_SCORE, TritonBackend

backend = TritonBackend()
TESTS = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)


@pytest.mark.parametrize(
    "what", ["panels", "persistent", "float32", "float16", "bfloat16", "whole", "exact", "hostile"]
)
def test_interpreted(what):
    """The real driver and the one rule, with the kernels in Triton's interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "interpreted.py"), what]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_tma_unit_copies():
    """One row of an expanded matrix is contiguous for torch and has a stride of 0, which no descriptor may have."""
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    expanded = x[0].expand(4, 64)[:1]
    assert expanded.is_contiguous() and not persistent_launch.copies_by_tma(expanded)
    assert persistent_launch.copies_by_tma(x, x[:1], x[:, :9], x[:, 8:])
    assert not persistent_launch.copies_by_tma(x, x[:, 1:])
    assert not persistent_launch.copies_by_tma(x[:, :9].contiguous())


def require(capability):
    """Skips where the Triton that is here cannot compile for an architecture, which the backend then refuses."""
    reason = backend.why_not_capability(capability, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)


def holds_most(case):
    return case.statistics and case.weights and (case.two_sided or case.term == "sigmoid")


def thinned(capability):
    """Of an architecture's configurations, every one in bfloat16; of the other dtypes, those with the most to hold.

    Of architectures but Hopper they are few in the short form.
    """
    for case in offline.cases(capability):
        if THOROUGH or capability == 90:
            taken = case.dtype == "bf16" or holds_most(case)
        else:
            taken = case.dtype == "bf16" and holds_most(case)
        if taken:
            yield case


def in_16_bits():
    """Those in bfloat16, persistent ones too."""
    return [
        c for c in (*itertools.chain(*map(thinned, ARCHITECTURES)), *offline.persistent_cases(90)) if c.dtype == "bf16"
    ]


@pytest.mark.parametrize("case", [*itertools.chain(*map(thinned, ARCHITECTURES))], ids=str)
def test_compiled(case):
    """No spills, memory that there is, and the architecture's own matrix instructions."""
    require(case.capability)
    made = offline.compile_score(case)
    assert made.stack == 0, f"{made.stack} bytes of registers spilled"
    assert made.shared <= configs.shared_memory(case.capability)
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[case.capability]
    assert (wanted in made.ptx) == (case.precision != "ieee")
    if case.weights:
        assert "st.global.v4" in made.ptx, "weights leave the chip 16 bytes at a time"
    if case.capability == 90 and case.precision != "ieee":
        assert made.programs(90) >= 2, "nobody multiplies while a program finishes its tile"
        if case.dtype == "bf16":
            assert offline.broken(case, made) is None


@pytest.mark.parametrize("case", [*offline.persistent_cases(90)], ids=str)
def test_persistent_compiled(case):
    """Few or no spills, two programs a multiprocessor, operands by the TMA unit."""
    require(90)
    made = offline.compile_score(case)
    assert offline.broken(case, made) is None
    assert "cp.async.bulk.tensor" in made.ptx


def seldom():
    """Exponentials that are kept, ceilings, and a guide: in the short form one of each."""
    kept, capped, guided = [*offline.kept_cases(90)], [*offline.capped_cases(90)], [*offline.guided_cases(90)]
    return [*kept, *capped, *guided] if THOROUGH else [kept[-2], capped[1], guided[1]]


@pytest.mark.parametrize("case", seldom(), ids=str)
def test_kept_capped_and_guided_compile(case):
    """As good as the others: no spills but of two sides at once, two programs a multiprocessor, vectors in and out."""
    require(90)
    assert offline.broken(case, offline.compile_score(case)) is None
    if case.keeps:
        made = offline.compile_kept(case)
        assert made.stack == 0 and made.programs(90) >= 4
        assert "ld.global.v4" in made.ptx and "st.global.v4" in made.ptx


OTHER_TRITON = TESTS.parent / "build/triton-3.6"


@pytest.mark.skipif(not (OTHER_TRITON / "triton").exists(), reason="make test puts Triton 3.6 there")
def test_the_triton_of_torch_2_11():
    """What runs on most GPUs at present compiles as well as by the newest."""
    path = os.pathsep.join([str(OTHER_TRITON), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(TESTS / "offline.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "triton 3.6" in result.stdout


@pytest.mark.parametrize("case", in_16_bits(), ids=str)
def test_rest_compiled(case):
    require(case.capability)
    made = offline.compile_rest(case)
    assert made.stack == 0 and made.shared <= configs.shared_memory(case.capability)


@pytest.mark.parametrize("case", [c for c in offline.cases(90) if c.dtype == "bf16"], ids=str)
def test_odd_sizes_compile_too(case):
    """Rows that are no whole vectors, and features that are no whole blocks."""
    work = configs.work_of(case.weights, case.statistics, case.two_sided)
    made = offline.compile_score(replace(case, even=False, tile=configs.tile_for(90, "16-bit", work, 65)))
    assert made.stack == 0 and "wgmma.mma_async" in made.ptx


LABELLED = [
    replace(case, labels=True)
    for case in in_16_bits()
    if case.term == "exponential" and case.weights and not case.statistics and (THOROUGH or case.capability == 90)
]


@pytest.mark.parametrize("case", LABELLED, ids=str)
def test_targets_compile_too(case):
    """Weights less targets by ids, in usual tiles and in the rest; four more vectors than usual, so a few spills."""
    require(case.capability)
    usual, rest = offline.compile_score(case), offline.compile_rest(case)
    most = 256 if isinstance(case.tile, configs.PersistentTile) else 64
    for made, spilled in ((usual, most), (rest, 192)):
        assert made.shared <= configs.shared_memory(case.capability)
        assert made.stack <= spilled, f"{made.stack} bytes of registers spilled"


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("term", ["exponential", "sigmoid"])
def test_merge_compiles(term, capability):
    made = offline.compile_merge(capability, term)
    assert made.stack == 0


def test_shipped_tiles_are_legal():
    for member, precision, work, tile in configs.shipped():
        assert configs.legality(tile, member, precision) is None, (member, precision, work)


@pytest.mark.parametrize(
    "tile, capability, precision, word",
    [
        (configs.Tile(128, 128, 64, 8, 3), 75, "16-bit", "below 8.0"),
        (configs.Tile(96, 128, 64, 8, 3), 90, "16-bit", "block_m: expected a power of two; got 96"),
        (configs.Tile(8, 128, 64, 8, 3), 90, "16-bit", "at least 16"),
        (configs.Tile(256, 256, 64, 8, 3), 90, "16-bit", "accumulators"),
        (configs.Tile(64, 128, 64, 8, 3), 90, "16-bit", "wgmma"),
        (configs.Tile(128, 256, 64, 8, 5), 90, "16-bit", "shared memory"),
        (configs.Tile(128, 128, 64, 8, 3), 86, "tf32", "shared memory"),
        (configs.PersistentTile(128, 128, 64, 4, 4, programs=2), 90, "16-bit", "shared memory"),
        (configs.PersistentTile(128, 128, 64, 8, 3), 100, "16-bit", "on Hopper"),
        (configs.PersistentTile(128, 128, 64, 8, 3, parts=4), 90, "16-bit", "parts"),
    ],
)
def test_illegal_tiles_say_why(tile, capability, precision, word):
    assert word in configs.legality(tile, capability, precision)


def test_families_of_architectures():
    assert [configs.family(c) for c in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)] == [
        None, 80, 86, 80, 86, 90, 100, 100, 120, 120,
    ]  # fmt: skip


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self):
        return offline.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def absent_gpu(monkeypatch, tmp_path):
    """An H100 that nobody has measured, as far as the launcher asks."""
    monkeypatch.setattr(launch, "_capability", lambda device: 90)
    monkeypatch.setattr(launch, "gpu_name", lambda device: "GPU")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuning, "tiles", tuning.TunedTiles(tmp_path / "cache" / "tiles.json"))
    launch.forget_tiles()
    yield
    launch.forget_tiles()


@pytest.fixture
def started(monkeypatch, absent_gpu):
    """The kernels that would have started on an H100, compiled from the launcher's own arguments."""
    kernels = []

    def start(kernel, programs, arguments, **constants):
        kernels.append(kernel.warmup(*arguments.values, grid=(programs,), **constants, enable_fp_fusion=True))

    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGPU())
    monkeypatch.setattr(launch, "_launch", start)
    return kernels


def test_launchers_arguments_compile(started):
    """The path of a real launch up to the driver: every argument, with and without what may be missing."""
    n, m, d = 200, 300, 64
    x, y = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(m, d, dtype=torch.bfloat16)
    params, scratch = torch.ones(3), torch.zeros(100_000)
    weights, dparams = torch.zeros(n, 320, dtype=torch.bfloat16)[:, :m], torch.zeros(2, dtype=torch.float64)
    row, col = torch.zeros(2, n), torch.zeros(2, m)
    columns = launch.Pairs(None, torch.zeros(n, 1, dtype=torch.int64), 7, col[0])
    both = launch.Vectors(row), launch.Vectors(col)
    launch.run_panel("exponential", x, y, params, columns, *both, scratch)
    sides = launch.Vectors(None, row, row[0]), launch.Vectors(None, col, col[0])
    launch.run_panel("exponential", x, y, params, launch.Pairs(0), *sides, scratch, weights, params[:1], dparams)
    one = launch.Vectors(row[:1], None, row[1]), launch.Vectors()
    launch.run_panel("sigmoid", x, y, params, launch.Pairs(), *one, scratch, weights, params[:1])
    assert [kernel.name for kernel in started] == ["score_kernel", "rest_kernel", "merge_kernel"] * 3
    assert all("wgmma.mma_async" in kernel.asm["ptx"] for kernel in started[::3])
    assert [kernel.metadata.num_warps for kernel in started[::3]] == [8, 4, 4]


@pytest.mark.parametrize(
    "dtype, index",
    [*itertools.product((torch.bfloat16, torch.float16, torch.float32), (False, True))][:: every(5)],
)
def test_kernels_around_the_panels_compile(started, dtype, index):
    """With and without what may be missing; for a few rows and for many."""
    for n, m, d in ((200, 200, 64), (3000, 3000, 100)):
        x, y = torch.zeros(n, d, dtype=dtype), torch.zeros(m, d, dtype=dtype)
        positives = torch.zeros(n, dtype=torch.int64) if index else None
        scale, dx, dy = torch.ones(()), torch.zeros(n, d), torch.zeros(m, d)
        dots, params = vector_launch.positive_dots(x, y, positives, 0, scale, 0.0, True)
        row, col = torch.zeros(2, n), torch.zeros(2, n)
        for other, gain, summed in ((col, None, True), (None, dots, False)):
            vector_launch.losses(row, other, dots, params, gain, 0.5, summed)
            upstream = torch.ones(()) if summed else dots
            gains = vector_launch.gains(row, other, dots, scale if summed else 3.0, gain, 0.5, upstream)
            assert gains.dparams.dtype == torch.float64 and gains.dparams.shape == (2,)
        vector_launch.gradients(x, y, positives, 0, dots, None, (dx, x), (dy, y))
        vector_launch.gradients(x, y, positives, 0, dots, params[:1], (dx[:100], x[:100]), None, 100)
        vector_launch.gradients(x, y, None, None, None, None, None, (dy, y))
    assert len(started) == 2 * 8
    assert all(offline.registers_and_stack(kernel)[1] == 0 for kernel in started)


def test_cache_key_follows_the_members():
    """A pair term's key holds its members' keys: an edited member is another kernel on disk."""
    for term in launch.TERMS.values():
        assert all(member.cache_key in term.cache_key for member in term)
        other = term._replace(merge=launch.TERMS["exponential"].tile)
        assert other.cache_key != term.cache_key


def test_scratch_is_bounded():
    """What the driver counts per score and per row covers what a panel's partial results take, for every tile."""
    tiles = {tile for *_, tile in configs.shipped()}
    tiles |= {configs.tile_for(90, "16-bit", work, capped=True) for work in configs.WORKS}
    tiles |= {configs.tile_for(90, "16-bit", work, guided=True) for work in configs.WORKS}
    tiles |= {tile.part for capped in (False, True) for tile in configs.persistent_tiles(90, "16-bit", capped)}
    sides = (1, 64, 65, 1000, 4416), (1, 64, 65, 1000, 5504), (False, True)
    for tile, rows, cols, kept in itertools.product(tiles, *sides):
        floats = sum(launch.Scratch.of(tile, rows, cols, kept))
        per_score = SCRATCH_PER_SCORE + kept * KEPT_PER_SCORE
        bound = per_score * rows * cols + SCRATCH_PER_ROW * (rows + cols) + 128
        assert 4 * floats <= bound, (tile, rows, cols, kept)


def test_measured_tiles_are_kept_and_found(absent_gpu):
    """Written by one process, read by the next; another key, or a tile that is no longer legal, has the table's."""
    path = tuning.tiles.path
    tile = configs.Tile(64, 128, 32, 4, 2)
    name = tuning.key("GPU", triton.__version__, "16-bit", "reduce", 500)
    tuning.TunedTiles(path).put({name: tile})
    tuning.TunedTiles(path).put({name.replace("reduce", "both"): configs.Tile(256, 256, 64, 4, 2)})
    assert tuning.TunedTiles(path).get(name) == tile
    device = torch.device("cuda", 7)
    assert launch.tile_of(device, "16-bit", "reduce", 512) == tile
    assert launch.tile_of(device, "16-bit", "reduce", 513) == configs.tile_for(90, "16-bit", "reduce")
    assert launch.tile_of(device, "16-bit", "both", 512) == configs.tile_for(90, "16-bit", "both")


def test_measured_persistent_tiles_are_kept_and_found(absent_gpu):
    """By the same file; ceilings, the sigmoid term and tiles that are no longer legal have the table's."""
    tile, wrong = configs.PersistentTile(128, 256, 64, 8, 3, parts=2), configs.PersistentTile(128, 256, 64, 8, 8)
    for work, each in (("both", tile), ("fused", tile), ("reduce", wrong)):
        name = tuning.key("GPU", triton.__version__, "16-bit", tuning.persistently(work), 512)
        tuning.TunedTiles(tuning.tiles.path).put({name: each})
    device = torch.device("cuda", 7)

    def chosen(work, term="exponential", capped=False):
        return launch.persistent_of(device, "16-bit", work, term, 500, capped)

    assert chosen("both") == chosen("fused") == tile and chosen("both", capped=True) is None
    for work, term in (("reduce", "exponential"), ("fused", "sigmoid"), ("weights", "exponential")):
        assert chosen(work, term) == configs.persistent_tile_for(90, "16-bit", work, term)
    assert chosen("reduce", capped=True).parts == 2
    rows, cols = 5000, 4000
    floats = launch.scratch_floats(rows, cols, device, torch.bfloat16, 500)
    assert floats >= sum(launch.Scratch.of(tile.part, rows, cols))


@pytest.mark.parametrize("work", configs.WORKS)
def test_measuring_tries_every_candidate(work, absent_gpu, monkeypatch):
    """Without a GPU: the launches that would be timed, and the choice by made-up times."""
    tried = []

    def start(kernel, programs, arguments, **constants):
        if kernel is launch.score_kernel:
            shape = constants["BLOCK_M"], constants["BLOCK_N"], constants["BLOCK_K"]
            tried.append(configs.Tile(*shape, constants["num_warps"], constants["num_stages"]))
            assert programs == -(-300 // shape[0]) * -(-300 // shape[1])
            assert constants["COL"] == (work != "weights")

    def bench(run, return_mode):
        run()
        return 2.0 if tried[-1] != wanted else 1.0

    candidates = tuning.candidates(90, "16-bit", work)
    wanted = candidates[5]
    monkeypatch.setattr(launch, "_launch", start)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    assert launch.measure(torch.device("cpu"), "16-bit", work, 96, torch.bfloat16, 300) == wanted
    assert tried == candidates


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": {"block_m": 64}}', '{"a": 3}'])
def test_a_damaged_file_of_tiles_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="tiles.json is left aside"):
        assert tuning.TunedTiles(path).get("a") is None


def test_candidates_are_legal_and_the_fastest_wins():
    for member, precision, work, tile in configs.shipped():
        tried = tuning.candidates(member, precision, work)
        assert tried[0] == tile and len(set(tried)) == len(tried) > 3
        assert all(configs.legality(each, member, precision) is None for each in tried)
        assert min(min(each.block_m, each.block_n) for each in tried) >= 64, (
            "what the driver's bound of scratch counts on"
        )
        persistent = tuning.persistent_candidates(member, precision, work)
        assert (len(persistent) > 3) == (
            configs.persistent_tile_for(member, precision, work, "exponential") is not None
        )
        assert all(configs.legality(each, member, precision) is None for each in persistent)
        assert all(isinstance(each, configs.PersistentTile) and each.part.block_n >= 64 for each in persistent)
    times = dict(zip(tried, [2.0, None, 1.0, 1.0]))
    assert tuning.fastest(tried, times.get) == (tried[2], 1.0)
    with pytest.raises(RuntimeError, match="no tile ran"):
        tuning.fastest(tried, lambda tile: None)
    with pytest.raises(TypeError, match="features: expected an int"):
        ck.autotune(3.0)


def test_this_process_is_not_interpreted():
    """The interpreter is for a process of its own: here it would take the CPU's tensors, slowly."""
    assert not launch.INTERPRETED
    assert "triton" in sys.modules and ck.why_not("triton", torch.zeros(1, 1)) is not None


def test_reasons(monkeypatch):
    cpu = torch.device("cpu")
    assert "CUDA" in backend.why_not(cpu, torch.float32)
    assert "float64" in backend.why_not_capability(90, torch.float64)
    assert "8.0" in backend.why_not_capability(75, torch.float32)
    assert backend.why_not_capability(90, torch.bfloat16) is None
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 6))
    assert "3.8" in backend.why_not_capability(100, torch.bfloat16)
    assert backend.why_not_capability(90, torch.bfloat16) is None
    assert backend.why_not_capability(120, torch.bfloat16) is None
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 10))
    assert backend.why_not_capability(100, torch.bfloat16) is None
    with pytest.raises(ValueError, match="'triton' cannot serve"):
        ck.clip_loss(torch.eye(4), torch.eye(4), 1.0, backend="triton")


def test_package_lives_without_triton():
    """Neither the import nor a loss needs Triton, and the reason says that it is missing."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("blocked for the test")
sys.meta_path.insert(0, Blocked())
import torch, contrastive_kernels as ck
from contrastive_kernels.backends.triton import TritonBackend
assert "triton" not in sys.modules
ck.clip_loss(torch.eye(4), torch.eye(4), 1.0)
print(TritonBackend().why_not_capability(90, torch.float32))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not installed" in result.stdout or "blocked" in result.stdout
