"""The loss over a data set: value, gradients and memory against the dense definition in float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from asked import Normalizing, assert_near, fits, settings_of, workspace_of
from data_set import Batch, Rule, loss_of_scores, memory_after
from drawn import FEATURES, LAYOUTS, REDUCTIONS, ROWS, Way, ways_of
from fuzzing import fuzzed
from hypothesis import assume
from hypothesis import strategies as st
from problems import Outcome, Problem, make_inputs, score_dtype
from tolerance import LOGIT_UNITS, UNITS

import contrastive_kernels as ck
from contrastive_kernels.draws.gamma import draw_log_weights

NAMES = ("x", "y", "scale", "logits")


@dataclass(frozen=True)
class Step:
    """A batch and what is known of it."""

    problem: Problem
    rule: Rule
    directions: int = 2
    direction: int | None = None
    #: the positives' logits are given, and every column is a negative
    given: bool = False
    #: samples of the batch that the memory has met, of which so many times
    met: str = "all"
    visits: int = 1
    #: some sample stands in two rows
    repeated: bool = False
    trains: bool = True


@st.composite
def steps(draw):
    """A step of a drawn batch."""
    directions = draw(st.sampled_from((1, 2)))
    direction = draw(st.sampled_from((None, *range(directions))))
    two = directions == 2 and direction is None
    given = not two and draw(st.booleans())
    n, offset = draw(st.sampled_from(ROWS[:-1])), 0 if two or given else draw(st.sampled_from((0, 1, 5)))
    m = n if two else n + offset + draw(st.sampled_from((0, 1, 31, 67)))
    negatives = draw(st.sampled_from(("dataset", "batch", 7)))
    rule = Rule(
        shape=draw(st.sampled_from((None, None, 0.5, 1.0))),
        negatives=negatives,
        include_positive=draw(st.booleans()),
        weights=draw(st.sampled_from(("stored", "stored", "updated", "batch", 3.0))),
        max_ratio=draw(st.sampled_from((None, None, 1.5, *(("partial sum",) if negatives == "dataset" else ())))),
        first_visit=draw(st.sampled_from(("reduce", "skip"))),
        safeguard=draw(st.sampled_from((None, *((0.0, 1.0) if negatives == "dataset" else ())))),
        step=draw(st.sampled_from((1.0, 0.5))),
        floor=draw(st.sampled_from((0.1, 0.9))),
        reduction=draw(st.sampled_from(REDUCTIONS)),
    )
    problem = Problem(
        name=f"drawn-{draw(st.integers(0, 2**16))}",
        reason="drawn",
        n=n,
        m=m,
        d=draw(st.sampled_from(FEATURES)),
        scale=draw(st.sampled_from((1e-3, 0.5, 3.0, 14.3, 100.0, 0.0, -3.0))),
        features=draw(st.sampled_from(("random", "random", "identical", "common"))),
        layout=draw(st.sampled_from(LAYOUTS[:-1])),
        positives=offset,
        weight=draw(st.sampled_from((None, None, "sparse", "zero"))),
        losses=("info_nce",),
    )
    met, visits = draw(st.sampled_from(("all", "some", "none"))), draw(st.sampled_from((1, 3)))
    return Step(
        problem, rule, directions, direction, given, met, visits, draw(st.booleans()), draw(st.booleans())
    )  # fmt: skip


class Case:
    """A step's tensors: the loss with its memory, the batch's samples, and the arguments."""

    def __init__(self, step: Step, way: Way) -> None:
        self.step, self.way = step, way
        self.inputs = make_inputs(step.problem, way.dtype)
        n, g = len(self.inputs.x), torch.Generator().manual_seed(step.problem.seed)
        self.index = torch.randperm(step.rule.num_samples, generator=g)[:n]
        if step.repeated and n > 2:
            self.index[n // 2] = self.index[0]
        self.logits = torch.randn(n, generator=g).to(self.inputs.scale.dtype) if step.given else None
        self.known = {"all": self.index, "some": self.index[::2], "none": self.index[:0]}[step.met]
        self.stored = torch.randn(len(self.known), step.directions, generator=g, dtype=torch.float64)

    def loss(self, workspace_bytes: int | None = None) -> ck.DatasetContrastiveLoss:
        """With the memory as it is before the step."""
        more = {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
        loss = ck.DatasetContrastiveLoss(
            **asdict(self.step.rule), directions=self.step.directions, backend=self.way.backend,
            normalize=self.way.normalize, **more,
        )  # fmt: skip
        for _ in range(self.step.visits):
            loss.memory.update(self.known, self.stored)
        return loss.train(self.step.trains)

    def leaves(self, dtype: torch.dtype | None, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The arguments that are differentiated, in a dtype (None: their own)."""
        given = {"x": self.inputs.x, "y": self.inputs.y, "scale": self.inputs.scale}
        if self.logits is not None:
            given["logits"] = self.logits
        return {k: (v if dtype is None else v.to(dtype)).detach().requires_grad_(k in needs) for k, v in given.items()}

    def ask(self, size: int | None = None):
        """Value, gradients and memory of the package."""
        step, loss, way = self.step, self.loss(size), self.way
        leaves = self.leaves(None, tuple(name for name in NAMES if name in (*way.needs, "logits")))
        offset = {"positives": step.problem.positives} if step.problem.positives else {}
        value = loss(
            leaves["x"], leaves["y"], self.index, leaves["scale"], direction=step.direction, **offset,
            positive_logits=leaves.get("logits"), weight=self.inputs.weight, generator=self.generator(),
        )  # fmt: skip
        if value.requires_grad:
            value.backward(self.upstream(value))
        return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}, loss.memory

    def define(self, dtype: torch.dtype, of_value: bool = False):
        """Value, gradients, |dL/dz|, what was found and the largest |log Z| of the definition."""
        step, memory = self.step, self.loss().memory
        columns = slice(step.directions) if step.direction is None else slice(step.direction, step.direction + 1)
        log_mean, visits = (v[:, columns] for v in memory.read(self.index))
        generator = self.generator()
        drawn = [draw_log_weights(column, step.rule.shape, generator) for column in log_mean.T]
        leaves = self.leaves(dtype, NAMES)
        x, y = (self.unit(leaves[name]) for name in ("x", "y"))
        z = leaves["scale"] * (x @ y.T)
        z.retain_grad()
        batch = Batch(log_mean, visits, torch.stack(drawn, 1))
        value, found, largest = loss_of_scores(
            z, step.rule, batch, step.problem.positives, leaves.get("logits"), self.inputs.weight
        )
        value.backward(torch.ones_like(value) if of_value else self.upstream(value))
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        negatives = z.shape[1] - (not step.given)
        after = memory_after(step.rule, memory, self.index, columns, found.double(), negatives)
        return value.detach(), gradients, z.grad.abs(), after, largest

    def unit(self, v: torch.Tensor) -> torch.Tensor:
        """Features as they are multiplied."""
        return Normalizing(self.way.dtype).unit(v) if self.way.normalize else v

    def generator(self) -> torch.Generator:
        """Of the draws of u."""
        return torch.Generator().manual_seed(self.step.problem.seed)

    def upstream(self, value: torch.Tensor) -> torch.Tensor:
        """A random gradient in the value's shape."""
        g = torch.Generator().manual_seed(self.step.problem.seed + 1)
        return torch.randn(value.shape, generator=g, dtype=torch.float64).to(value)

    def floors(self, value: torch.Tensor, w: torch.Tensor, of_value: torch.Tensor, largest: float):
        """The rule's floors as in tolerance.py, and the largest rounding of a logit."""
        inputs, eps = self.inputs, torch.finfo(self.way.dtype).eps
        x, y, scale = (v.double() for v in (inputs.x, inputs.y, inputs.scale.abs()))
        x, y, eps = self.unit(x), self.unit(y), 2 * eps if self.way.normalize else eps
        score_eps = torch.finfo(inputs.scale.dtype).eps
        logits = scale * x.norm(dim=1)[:, None] * y.norm(dim=1)
        rounding = LOGIT_UNITS * score_eps * (logits + largest + 1)
        parts, wide = w * (UNITS * eps + rounding), w * (UNITS * score_eps + rounding)
        tops = [v.abs().max() if v.numel() else v.new_zeros(()) for v in (x, y)]
        weight = inputs.weight.double().max().clamp(min=1.0) if inputs.weight is not None and len(x) else 1.0
        floors = {
            "value": (of_value * rounding).sum() + UNITS * score_eps * (value.abs() + weight * (1 + largest)),
            "x": (scale * tops[1] * parts.sum(1))[:, None],
            "y": (scale * tops[0] * parts.sum(0))[:, None],
            "scale": (wide * (x @ y.T).abs()).sum(),
            "logits": wide.sum(1),
        }
        return floors, rounding.max().item() if rounding.numel() else score_eps


@fuzzed(30, step=steps(), way=ways_of("info_nce"))
def test_data_set_loss(step, way):
    """A step of stochastic EM, whatever the memory has met."""
    case = Case(step, way)
    truth, true_gradients, w, (log_mean, visits), largest = case.define(torch.float64)
    assume(fits(Outcome(truth, true_gradients), way.dtype))
    with settings_of(way):
        value, gradients, memory = case.ask(workspace_of(way, case.ask))
    plain, plain_gradients, *_ = case.define(score_dtype(way.dtype))
    of_value = case.define(torch.float64, of_value=True)[2]
    floors, rounding = case.floors(truth, w, of_value, largest)
    assert_near("value", value, truth, (plain.double() - truth).abs(), floors["value"])
    for name, want in true_gradients.items():
        if gradients[name] is None:
            assert name not in (*way.needs, "logits"), f"d{name} is missing"
            continue
        error = (plain_gradients[name].to(gradients[name].dtype).double() - want).abs()
        assert_near(f"d{name}", gradients[name], want, error, floors[name])
    if not step.trains:
        log_mean, visits = case.loss().memory.log_mean, case.loss().memory.visits
    assert torch.equal(memory.visits, visits)
    assert ((memory.log_mean - log_mean).abs() <= 2 * rounding).all()
    make_inputs.cache_clear()
