"""The microbenchmark: nothing wrong is timed, nothing is stored twice, and its yardsticks measure what they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import cases, check, goals, measure, memory, results
from bench.__main__ import main
from bench.cases import Case, Inputs, make_inputs
from bench.formulas import BLOCKED, DENSE, call_directly
from bench.providers import Provider, get, providers, register
from bench.run import Session, grouped
from contrastive_kernels.panels.size import workspace_for
from contrastive_kernels.planning.costs import LOSSES

PEERS = {
    *("dense", "dense-compiled", "linear-cross-entropy", "checkpointed"),
    *("lightly", "metric-learning", "memeff", "siglip-kernel", "inf-cl"),
}
SMALL = Case("clip_loss", 24, 8)
needs_proc = pytest.mark.skipif(memory.why_not("cpu") is not None, reason=str(memory.why_not("cpu")))


# ---- the registry ----


def test_every_backend_and_every_peer_has_a_provider():
    import contrastive_kernels as ck

    assert set(providers()) == PEERS | {"em-step"} | {f"ours-{name}" for name in ck.list_backends()}
    for loss in LOSSES:
        able = {name for name, p in providers().items() if loss in p.losses}
        assert {"ours-torch", "ours-cpu", "dense", "checkpointed"} <= able
    assert set(DENSE) == set(BLOCKED) == set(LOSSES)


def test_every_default_case_has_somebody_to_compare_with():
    for case in cases.standard_cases():
        able = [p for p in providers().values() if p.why_not(case) is None and p.by_default(case)]
        assert any(p.is_ours for p in able) and any(not p.is_ours for p in able), case.title


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("memeff", Case("clip_loss", 64, 32), "cuda only"),
        ("linear-cross-entropy", Case("sigmoid", 64, 32), "no sigmoid"),
        ("lightly", Case("nt_xent", 64, 32), "no gradient"),
        ("dense", Case("clip_loss", 10**7, 32), "GB"),
        ("ours-cpu", Case("clip_loss", 64, 32, dtype="float64"), "float64"),
    ],
)
def test_who_cannot_says_why(name, case, reason):
    assert reason in get(name).why_not(case)


def test_a_case_that_does_not_exist_is_refused():
    for wrong in ({"loss": "triplet"}, {"dtype": "int8"}, {"mode": "bwd"}, {"m": 5}, {"m": 99}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Case(**{"loss": "clip_loss", "n": 8, "d": 4, **wrong})
    with pytest.raises(ValueError, match="provider"):
        get("nobody")


# ---- right and wrong ----


@pytest.mark.parametrize("loss", LOSSES)
def test_formulas_agree_with_the_definition(loss):
    case = Case(loss, 45, 12, dtype="float64")
    value, grads = check.truth(case, False)
    formulas = {"dense": DENSE[loss], "blocked": lambda i: BLOCKED[loss](i, 16, call_directly)}
    for name, formula in formulas.items():
        inputs = make_inputs(case, seed=1)
        got = check.evaluate(lambda formula=formula, inputs=inputs: formula(inputs), inputs, case.mode)
        torch.testing.assert_close(float(got), value, rtol=1e-12, atol=1e-12, msg=name)
        for leaf, tensor in inputs.leaves.items():
            torch.testing.assert_close(tensor.grad, grads[leaf], rtol=1e-9, atol=1e-12, msg=f"{name} {leaf}")


class _TimesGradient(torch.autograd.Function):
    """The identity, whose gradient is not one."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _altered(name: str, alter) -> Provider:
    """dense, with ``alter(case, inputs)`` applied to its inputs, and the loss multiplied by what ``alter`` returns."""

    def build(case: Case, inputs: Inputs):
        def forward():
            altered, factor = alter(case, inputs)
            return DENSE[case.loss](altered) * factor

        return forward

    return Provider(name, build, frozenset(DENSE))


def _scaled_gradient(factor: float):
    return lambda case, i: (dataclasses.replace(i, y=_TimesGradient.apply(i.y, factor)), 1.0)


WRONG = {
    "value": lambda case, i: (i, 1.01),
    "dy": _scaled_gradient(1.01),
    "nan": lambda case, i: (i, float("nan")),
    "dscale": lambda case, i: (dataclasses.replace(i, scale=i.scale.detach()), 1.0),
}


@pytest.fixture
def registry():
    """The registry, restored afterwards."""
    before = dict(providers())
    yield
    providers().clear()
    providers().update(before)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_provider_gets_no_time(what, registry):
    register(_altered("liar", WRONG[what]))
    rows = Session(1, rounds=1).time_group([(SMALL, get("liar")), (SMALL, get("dense"))])
    assert [row["status"] for row in rows] == ["wrong", "ok"]
    assert "best_s" not in rows[0] and "off by" in rows[0]["reason"]
    assert rows[1]["best_s"] > 0
    assert Session(1).memory_row(SMALL, get("liar"))["status"] == "wrong"


def test_in_16_bits_logits_may_be_rounded():
    case = Case("clip_loss", 8, 256, dtype="bfloat16")
    liar = dataclasses.replace(_altered("liar", WRONG["value"]), rounds_logits=True)
    right, wrong = (check.check_small(provider, case) for provider in (get("dense"), liar))
    assert right.ok and right.error > right.tolerance and not wrong.ok


def test_a_provider_that_raises_is_reported_with_its_reason(registry):
    def raises(case, inputs):
        raise RuntimeError("no kernel image\nand a long trace")

    register(Provider("broken", raises, frozenset(DENSE)))
    (row,) = Session(1, rounds=1).time_group([(SMALL, get("broken"))])
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no kernel image")


def test_what_is_wrong_only_at_full_size_is_found():
    """The projection on a random direction: right for dense, and 1 % of one gradient is seen."""
    case = Case("sigmoid", 80, 16)
    inputs = make_inputs(case)
    projection = check.project(case, inputs, beyond=32)
    for provider, ok in ((get("dense"), True), (_altered("liar", _scaled_gradient(1.01)), False)):
        value = check.evaluate(provider.build(case, inputs), inputs, case.mode)
        assert projection.check(provider, value, inputs, case.dtype).ok is ok


@pytest.mark.parametrize("loss", LOSSES)
def test_the_projection_is_the_gradients(loss):
    case = Case(loss, 40, 16, dtype="float64")
    inputs = make_inputs(case)
    projection = check.project(case, inputs, beyond=32)
    value = check.evaluate(get("ours-torch").build(case, inputs), inputs, case.mode)
    verdict = projection.check(get("ours-torch"), value, inputs, "float32")
    assert verdict.error < 1e-6, verdict


# ---- the floor ----


def test_products_are_counted_by_kind():
    counted = {loss: Case(loss, 64, 32).products for loss in LOSSES}
    assert counted["clip_loss"] == {"score": 2, "w_y": 1, "wT_x": 1}
    assert counted["decomposable"] == counted["sigmoid"] == {"score": 1, "w_y": 1, "wT_x": 1}
    assert counted["nt_xent"] == {"score": 1, "w_y": 1, "wT_x": 0}
    assert Case("nt_xent", 64, 32).flop == 2 * 128 * 128 * 32
    assert Case("info_nce", 64, 32, m=96).flop == 2 * 64 * 96 * 32
    for loss in set(LOSSES) - {"nt_xent"}:
        frozen = Case(loss, 64, 32, frozen_y=True).products
        assert frozen == {**counted[loss], "wT_x": 0}
        assert Case(loss, 64, 32, mode="fwd").products == {"score": 1, "w_y": 0, "wT_x": 0}


def test_the_floor_adds_up_products_at_their_own_rates():
    case = Case("clip_loss", 64, 32)
    rates = {"score": 1.0, "w_y": 2.0, "wT_x": 3.0}  # seconds of half a product
    works = {
        kind: measure.Work(lambda: None, "cpu", flop=case.flop / 2, seconds=[s, 2 * s]) for kind, s in rates.items()
    }
    assert measure.Floor(works, (64, 64)).seconds(case) == [2 * (2 * 1 + 2 + 3), 4 * (2 * 1 + 2 + 3)]


def test_the_floor_measures_all_tiles():
    case = Case("clip_loss", 96, 16)
    floor = measure.floor_works(case)
    assert floor.tile == (96, 96)
    measure.interleave(list(floor.works.values()), rounds=2)
    assert all(work.flop == case.flop and len(work.seconds) == 2 for work in floor.works.values())


def test_turns_rotate():
    order: list[str] = []
    works = [measure.Work(lambda name=name: order.append(name), "cpu") for name in "abc"]
    measure.interleave(works, rounds=3)
    assert "".join(order) == "abcbcacab"


def test_cases_of_one_shape_take_turns_together():
    pairs = [
        (Case(loss, n, 8, mode=mode), get("dense"))
        for n in (8, 16)
        for loss, mode in (("clip_loss", "fwd"), ("nt_xent", "fwd+bwd"))
    ]
    assert [[case.n for case, _ in group] for group in grouped(pairs)] == [[8], [8, 16], [16]]


# ---- memory ----


@needs_proc
def test_a_known_allocation_is_seen():
    def allocate(keep: bool):
        block = torch.ones(64 * 2**20 // 4)
        return block.nbytes if keep else 0

    assert 60e6 < memory.peak_of(lambda: allocate(False))[0] < 80e6
    assert memory.peak_of(lambda: allocate(True))[0] < 8e6, "what is left behind as a gradient is not counted"


@needs_proc
def test_a_process_of_its_own_sees_the_dense_matrices(tmp_path, capsys):
    path, n = tmp_path / "rows.json", 1500
    command = ["--memory", "--no-time", "--provider", "dense", "--n", str(n), "--d", "16"]
    assert main([*command, "--json", str(path)]) == 0
    (row,) = results.load(path)
    # eight N x N matrices live at once: logits, their log-softmaxes and the gradients of both, in either direction
    assert 2 * 4 * n**2 < row["peak_bytes"] < 9 * 4 * n**2
    assert "best_s" not in row
    assert "peak MB" in capsys.readouterr().out


def test_a_process_that_dies_is_reported_with_its_last_line(monkeypatch):
    command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    monkeypatch.setattr(memory, "child_command", lambda order: command)
    row = Session(1).memory_row(SMALL, get("dense"))
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of memory")


# ---- rows ----


def test_rows_are_updated_and_not_repeated(tmp_path):
    path = tmp_path / "rows.json"
    ours, dense = get("ours-torch"), get("dense")
    time_row = results.new_row(SMALL, ours, status="ok", best_s=2.0)
    assert results.save(path, [time_row, results.new_row(SMALL, dense, status="ok", best_s=3.0)]) == 2
    assert results.save(path, [results.new_row(SMALL, ours, status="ok", best_s=1.0)]) == 2
    assert results.save(path, [results.new_row(SMALL, ours, status="ok", peak_bytes=7)]) == 2
    assert results.save(path, [results.new_row(dataclasses.replace(SMALL, n=25, m=25), ours, status="ok")]) == 3
    (row,) = [r for r in results.load(path) if r["provider"] == "ours" and r["n"] == 24]
    assert (row["best_s"], row["peak_bytes"]) == (1.0, 7)
    assert results.case_of(row) == SMALL
    assert set(results.KEY) <= set(row)
    results.save(path, [results.new_row(SMALL, ours, status="wrong", reason="dx")])
    (row,) = [r for r in results.load(path) if r["provider"] == "ours" and r["n"] == 24]
    assert "best_s" not in row and "peak_bytes" not in row


# ---- goals ----


def test_goals_compare_with_their_bounds(monkeypatch):
    by_text = {goal.text: goal for goal in goals.GOALS}
    assert len(by_text) == len(goals.GOALS)
    floor = by_text["clip_loss, N = 8,192, D = 512: of its 4 products"]
    assert floor.value(lambda case, name: {"floor_ratio": 0.9}) == 0.9
    assert floor.verdict(0.9) == "met" and floor.verdict(0.84) == "not met"
    faster = by_text["decomposable, N = 8,192, D = 256: faster than clip_loss"]
    assert faster.value(lambda case, name: {"best_s": 3.0 if case.loss == "clip_loss" else 2.0}) == 1.5
    slow_at_64 = {8: 1.3, 64: 1.2}
    for loss, worst in (("info_nce", 1.2 / 1.1), ("sigmoid", 1.2)):
        share = by_text[f"{loss} bfloat16, N = 8 ... 4,096, D = 768: of the time it may take beside dense"]
        figure = share.value(lambda case, name: {"best_s": slow_at_64.get(case.n, 1.0) if name != "dense" else 1.0})
        assert figure == pytest.approx(worst) and not share.met(figure)
    peak = by_text["clip_loss, N = 32,768, D = 256: peak memory beyond inputs and gradients"]
    assert peak.value(lambda case, name: {"peak_bytes": 95e6}) == 95
    assert peak.met(95) and not peak.met(97)
    bf16 = by_text["clip_loss bf16, N = 8,192, D = 256: faster than dense"]
    monkeypatch.setattr(goals, "cpu_flags", lambda: frozenset({"avx2"}))
    assert "no AMX" in bf16.verdict(3.0)
    monkeypatch.setattr(goals, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert bf16.verdict(3.0) == "met" and bf16.verdict(2.4) == "not met"


def test_goals_are_measured_and_decide_the_exit_status(monkeypatch, capsys):
    command = importlib.import_module("bench.__main__")

    def goal(name: str, target: float, provider: str = "ours-torch") -> goals.Goal:
        return goals.Goal(name, target, ((SMALL, provider),), lambda row: row(SMALL, provider)["floor_ratio"])

    for targets, status in (([0.0], 0), ([0.0, 1e9], 1)):
        chosen = [goal(f"at least {target:g}", target) for target in targets]
        monkeypatch.setattr(command, "GOALS", [*chosen, goal("on a GPU", 0.0, "memeff")])
        assert main(["--goals", "--rounds", "1"]) == status
        printed = capsys.readouterr().out
        assert "memeff cannot run here" in printed and " met " in printed
        assert ("not met" in printed) == bool(status)


def test_goals_of_a_gpu_compare_with_their_bounds():
    by_text = {goal.text: goal for goal in goals.GPU_GOALS}
    assert len(by_text) == len(goals.GPU_GOALS)
    at = "N = 65,536, D = 768"

    def row(case: Case, name: str) -> dict[str, float]:
        assert (case.device, case.dtype) == ("cuda", "bfloat16")
        slow = {"memeff": 3.0, "inf-cl": 9.0, "dense": 2.0, "siglip-kernel": 1.5}.get(name, 1.0)
        faster = 0.7 if case.frozen_y or case.loss != "clip_loss" else 1.0
        return {"best_s": slow * faster, "floor_ratio": 0.8, "peak_bytes": 2**20 * 600}

    figures = {text: goal.value(row) for text, goal in by_text.items()}
    assert figures[f"clip_loss, {at}: of its 4 products"] == 0.8
    assert figures[f"clip_loss, {at}: faster than memeff"] == 3.0
    assert figures[f"sigmoid, {at}: of clip_loss's time"] == pytest.approx(0.7)
    assert figures[f"clip_loss, {at}: frozen y, of the two-sided time"] == pytest.approx(0.7)
    assert figures["clip_loss, N = 128, D = 768: of dense's time"] == 0.5
    memory_of = by_text["clip_loss, N = 4,096, D = 768: peak memory beyond inputs and gradients"]
    assert memory_of.value(row) > 1 and memory_of.verdict(1.01) == "not met"
    small, wide = (Case("clip_loss", 1000, 64, dtype=dtype, device="cuda") for dtype in ("bfloat16", "float32"))
    assert goals.memory_bound(small) - goals.memory_bound(wide) == 4 * 64 * 1000
    assert goals.memory_bound(wide) == workspace_for(torch.device("cuda")) + 64 * 2000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_goals_of_a_gpu_say_why_they_cannot_run(capsys):
    assert main(["--goals", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("there is no CUDA device") == len(goals.GPU_GOALS) and "bf16" in printed


# ---- the command ----


def test_quick_run_end_to_end(tmp_path, capsys):
    rows, folder = tmp_path / "rows.json", tmp_path / "plots"
    assert main(["--quick", "--provider", "ours-torch,dense", "--json", str(rows), "--plot", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "clip_loss fwd+bwd, N = 128" in printed and "ours-torch" in printed and "GEMM floor" in printed
    stored = json.loads(rows.read_text())
    assert len(stored) == 2 * len(cases.quick_cases())
    assert all(row["best_s"] > 0 and row["floor_ratio"] > 0 and row["error"] <= row["tolerance"] for row in stored)
    pictures = list(folder.glob("time_*.png"))
    assert len(pictures) == 1 and pictures[0].read_bytes().startswith(b"\x89PNG")
    assert main(["--show", "--json", str(rows)]) == 0
    assert "ours-torch" in capsys.readouterr().out


def test_what_is_stored_is_not_measured_again(tmp_path, capsys, monkeypatch):
    """A group is left out where all of it is there; another commit's rows do not count."""
    path = tmp_path / "rows.json"
    command = ["--provider", "ours-torch,dense", "--d", "8", "--rounds", "1", "--json", str(path), "--resume"]
    assert main([*command, "--n", "24"]) == main([*command, "--n", "24,40"]) == 0
    before = results.load(path)
    assert len(before) == 4
    assert main([*command, "--n", "24,40"]) == 0
    assert results.load(path) == before
    results.commit.cache_clear()
    monkeypatch.setattr(results, "_git", lambda *args: "another")
    assert main([*command, "--n", "24"]) == 0
    results.commit.cache_clear()
    assert len(results.load(path)) == 6


def test_a_stopped_run_says_what_it_found(monkeypatch, capsys):
    """Goals of the groups that were finished have their verdict."""
    command = importlib.import_module("bench.__main__")
    late = dataclasses.replace(SMALL, n=25, m=25)
    chosen = [
        goals.Goal(text, 0.0, ((case, "dense"),), lambda row, case=case: row(case, "dense")["best_s"])
        for text, case in (("early", SMALL), ("late", late))
    ]
    monkeypatch.setattr(command, "GOALS", chosen)
    whole = Session.time_group

    def stopped(self, pairs):
        if pairs[0][0] == late:
            raise KeyboardInterrupt
        return whole(self, pairs)

    monkeypatch.setattr(Session, "time_group", stopped)
    assert main(["--goals", "--rounds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "stopped" in printed and " met " in printed and "dense cannot run here" in printed


def test_rows_outside_a_checkout_have_the_commit_that_they_are_told(monkeypatch):
    def fails(*args):
        raise OSError

    monkeypatch.setattr(results, "_git", fails)
    for value, wanted in (("abc", "abc"), (None, "unknown")):
        results.commit.cache_clear()
        monkeypatch.setenv("BENCH_COMMIT", value) if value else monkeypatch.delenv("BENCH_COMMIT", raising=False)
        assert results.commit() == wanted
    results.commit.cache_clear()


def test_tf32_is_allowed_for_its_cases_alone():
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    with cases.precision(dataclasses.replace(SMALL, dtype="tf32")):
        assert allowed()
        with cases.precision(SMALL):
            assert not allowed()
    assert allowed() == before
    assert make_inputs(dataclasses.replace(SMALL, dtype="tf32")).x.dtype == torch.float32


def test_the_plan_is_printed_without_measuring(capsys):
    assert main(["--dry-run", "--case", "clip_loss,sigmoid", "--n", "64,128", "--memory"]) == 0
    printed = capsys.readouterr().out
    assert "sigmoid fwd+bwd, N = 128" in printed and "runs on cuda only" in printed and "Peak memory" in printed
    assert main(["--list"]) == 0
    assert "pytorch-metric-learning" in capsys.readouterr().out


def test_an_unknown_name_is_a_usage_error(capsys):
    for wrong in (["--provider", "nobody"], ["--case", "triplet"], ["--show"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "error" in capsys.readouterr().err
