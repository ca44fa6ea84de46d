"""Every loss over the ranks of a group against one process, by the one rule: value, gradients, shapes of grids."""

from __future__ import annotations

import pytest
import torch
from launch import run, succeeded
from problems import PROBLEMS, engine_options
from shards import Case, lose, together
from thorough import one_of
from tolerance import assert_outcome

import contrastive_kernels as ck


def options(problem, loss, dtype, strategy):
    """The engine's for a problem, in the panels that it asks for."""
    case = Case(problem.name, loss, dtype)
    backend = "torch" if dtype == torch.float64 else None
    found = engine_options(case.inputs(), loss, backend or "cpu")
    return {**found, "backend": backend, "strategy": strategy}


def check(cases, ranks, tmp_path):
    """Asserts the rule for every case; all complaints at once."""
    results = succeeded(run(ranks, lose, tmp_path, cases))
    complaints = []
    for i, case in enumerate(cases):
        try:
            outcome = together(case, [result[i] for result in results])
            assert_outcome(case.inputs(), case.loss, case.reduction, outcome)
        except AssertionError as error:
            complaints.append(f"{case}: {error}")
    assert not complaints, f"{len(complaints)} of {len(cases)}:\n" + "\n".join(complaints[:20])


#: u is drawn on every rank for itself.
SAME_DRAWS = [p for p in PROBLEMS if "shape" not in dict(p.decomposable)]
SAME_DRAWS = [p for p in SAME_DRAWS if not p.label_smoothing and p.margin is None and p.guide is None]


@pytest.mark.parametrize(
    "turn, dtype, strategy",
    [
        (0, torch.float32, "grid"),
        (1, torch.bfloat16, "replicated"),
        (2, torch.float64, "ring"),
        (3, torch.float32, "strips"),
    ],
    ids=str,
)
def test_every_problem(turn, dtype, strategy, tmp_path):
    """On three ranks, of which one has no rows: a grid of three rows, a ring, and all rows on every rank."""
    cases = [
        Case(problem.name, loss, dtype, gradients="sum", options=options(problem, loss, dtype, strategy))
        for number, problem in enumerate(SAME_DRAWS)
        for loss in one_of(number + turn, problem.losses)
        if problem.candidate_bias is None  # which ranks cannot share
    ]
    check(cases, 3, tmp_path)


def wants_all_rows(p):
    """Whether it has a member that ranks cannot share."""
    return p.label_smoothing or any(member is not None for member in (p.margin, p.candidate_bias, p.guide))


ALL_ROWS = [p for p in PROBLEMS if wants_all_rows(p)]
WITHOUT_REDUCTION = "smoothed", "candidate-bias", "margin", "guide"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_problem_for_which_every_rank_computes_all_rows(dtype, tmp_path):
    """Smoothing, biases with their gradients, margins, guides."""
    cases = [
        Case(
            problem.name, loss, dtype, reduction, "sum" if dtype == torch.float32 else "average",
            options=options(problem, loss, dtype, "auto"),
        )
        for problem in ALL_ROWS
        for loss in problem.losses
        for reduction in (("mean", "none") if problem.name in WITHOUT_REDUCTION else ("mean",))
        if loss in ("info_nce", "clip_loss", "nt_xent")
    ]  # fmt: skip
    check(cases, 3, tmp_path)


LOSSES = ("info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable", "decomposable_pair")


@pytest.mark.parametrize(
    "ranks, mesh", [(1, None), (2, None), (4, None), (4, (4, 1)), (4, (1, 4)), (6, None), (6, (2, 3)), (6, (3, 2))]
)
def test_every_shape_of_grid(ranks, mesh, tmp_path):
    """Of even and of uneven shards, with either rule of gradients, all reductions."""
    cases = [
        Case(
            "panels",
            loss,
            torch.float64,
            reduction,
            gradients,
            None,
            mesh,
            uneven,
            {"backend": "torch", "strategy": "grid"},
        )
        for loss in LOSSES
        for reduction in ("mean", "none")
        for gradients, uneven in (("average", False), ("sum", True))
    ]
    check(cases, ranks, tmp_path)


@pytest.mark.parametrize("strategy", ["replicated", "strips", "grid", "ring"])
def test_gradients_that_are_wanted(strategy, tmp_path):
    """A frozen tower, a scale that is a parameter or not, nothing at all."""
    needs = [("x",), ("y",), ("scale",), ("x", "scale"), ("x", "y"), ()]
    cases = [
        Case("sparse-weights", loss, torch.float32, reduction, needs=need, options={"strategy": strategy})
        for loss in LOSSES
        for reduction in ("mean", "none")
        for need in needs
    ]
    check(cases, 2, tmp_path)


def test_two_runs_agree_bitwise(tmp_path):
    cases = [
        Case("panels", loss, dtype, options={"strategy": strategy})
        for loss in LOSSES
        for dtype in (torch.float32, torch.bfloat16)
        for strategy in ("replicated", "strips", "grid", "ring")
    ]
    for one in succeeded(run(4, lose, tmp_path, [*cases, *cases])):
        for first, second in zip(one[: len(cases)], one[len(cases) :]):
            assert torch.equal(first.value, second.value)
            for name, gradient in first.gradients.items():
                assert gradient is None or torch.equal(gradient, second.gradients[name]), name


def refused() -> list[str]:
    x, bias, said = torch.eye(4), torch.zeros(4), []
    for loss, more in (("sigmoid", (-1.0,)), ("decomposable", (bias,))):
        with pytest.raises(NotImplementedError, match="candidate_bias: expected None in a process group") as caught:
            getattr(ck, loss)(x, x, 5.0, *more, candidate_bias=bias, group="world")
        said.append(str(caught.value))
    for strategy in ("grid", "ring"):
        with pytest.raises(NotImplementedError, match="with label_smoothing, for which every rank computes") as caught:
            ck.clip_loss(x, x, 5.0, label_smoothing=0.1, strategy=strategy, group="world")
        said.append(str(caught.value))
    return said


def test_what_ranks_cannot_share_is_refused_on_every_rank(tmp_path):
    assert all(len(found) == 4 for found in succeeded(run(2, refused, tmp_path)))
