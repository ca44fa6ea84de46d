"""The one list of problems, one factor at a time: every shape and every hard input that the losses are tried on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import labelled
import torch
from given import guide_of, normalizers_of
from made import biases_of, features_of, ids_of, lay_out, weights_of
from margins import margin_of
from outcomes import Outcome, smallest_workspace
from torch import Tensor

import contrastive_kernels

SOFTMAX = ("info_nce", "clip_loss", "nt_xent")
#: Losses of rectangular score matrices with positives anywhere.
ONE_WAY = ("info_nce", "decomposable")
#: Losses of matching rows. "decomposable_pair" trains both directions from a pair of normalisers.
PAIRED = ("clip_loss", "nt_xent", "sigmoid", "decomposable_pair")
DECOMPOSABLE = ("decomposable", "decomposable_pair")
ALL = ("info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable", "decomposable_pair")

#: Those that take a margin.
RATIOS = (*SOFTMAX, *DECOMPOSABLE)
#: Those that take biases of candidates.
BIASED = ("info_nce", "clip_loss", "nt_xent", "sigmoid", "decomposable")

#: Backends of CPU tensors. The others run on GPUs (test_gpu.py), or in an interpreter of their own (test_triton.py).
CPU_BACKENDS = ("cpu", "torch")


def call(loss: str, *arguments: Any, **options: Any) -> Tensor:
    """The loss of one of the names in ALL."""
    return getattr(contrastive_kernels, loss.removesuffix("_pair"))(*arguments, **options)


@dataclass(frozen=True)
class Problem:
    """One problem: what is unusual about it (`name`), and why that is worth a test (`reason`)."""

    name: str
    reason: str
    n: int = 65
    m: int | None = None
    d: int = 64
    temperature: float = 0.07
    #: a negative or zero scale is given here instead of by temperature
    scale: float | None = None
    #: None: it takes away the logits' common part
    bias: float | None = -3.0
    features: str = "random"
    #: the norm of what all features have in common
    length: float = 0.0
    layout: str = "contiguous"
    #: None, an offset, or "index": drawn with repeats
    positives: int | str | None = None
    #: None, "sparse" (random, with zeros among them) or "zero"
    weight: str | None = None
    #: None, or the ids of rows and columns: "shared" (a third as many as rows, negative and large ones among them),
    #: "equal" or "different"
    ids: str | None = None
    #: None, or what is added to the candidates' logits: "normal", or "padded" (-inf among them)
    candidate_bias: str | None = None
    #: a number or ("relative", number), moved so that no candidate lies at it: see `margin_of`
    margin: Any = None
    #: of a softmax loss: the margin of a guide whose scores are whole numbers: no candidate lies at its threshold
    guide: Any = None
    #: of a softmax loss: the denominator has the positive
    include_positive: bool = True
    #: of a softmax loss
    label_smoothing: float = 0.0
    #: panels as small as the engine takes them, so that several are walked in both directions
    small_panels: bool = False
    workspace_bytes: int | None = None
    #: log Zbar minus the batch's own log Z
    staleness: float = 0.0
    #: logits of the positives are given: "all" (no column is a positive) or "some" (positives -1 and indices)
    block: str | None = None
    #: further arguments of the decomposable loss
    decomposable: tuple[tuple[str, Any], ...] = ()
    #: float16 holds the gradients
    float16: bool = True
    losses: tuple[str, ...] = ALL

    @property
    def seed(self) -> int:
        """Of the problem's own random numbers."""
        return zlib.crc32(self.name.encode())

    @property
    def logit_bias(self) -> float:
        """What is added to the logits of the sigmoid loss."""
        return -(self.length**2) if self.bias is None else self.bias

    @property
    def logit_scale(self) -> float:
        """What multiplies the dot products."""
        return 1 / self.temperature if self.scale is None else self.scale


@dataclass
class Inputs:
    """A problem's arguments in one dtype."""

    problem: Problem
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    positives: int | Tensor | None = None
    weight: Tensor | None = None
    ids: tuple[Tensor, Tensor] | None = None
    candidate_bias: Tensor | None = None
    margin: Any = None
    #: guided and guided_margin
    guide: dict[str, Any] = field(default_factory=dict)
    log_normalizer: tuple[Tensor, Tensor] | None = None
    positive_logits: tuple[Tensor, Tensor] | None = None
    decomposable: dict[str, Any] = field(default_factory=dict)

    def call(
        self, module: Any, loss: str, x: Tensor, y: Tensor, scale: Tensor | float, bias: Tensor | float, **options: Any
    ) -> Any:
        """The loss as `module` (the package, or its reference) computes it, in the dtype of x."""
        if loss in labelled.LABELLED:
            return labelled.call(self, module, loss, x, y, scale, options)
        options |= {"weight": self.weight, **self.guide}
        if self.problem.label_smoothing:
            options["label_smoothing"] = self.problem.label_smoothing
        if self.ids is not None:
            options["ids"] = self.ids[0] if loss == "nt_xent" else self.ids
        if self.margin is not None:
            options["margin"] = self.margin
        if not self.problem.include_positive:
            options["include_positive"] = False
        if self.candidate_bias is not None:
            options.setdefault("candidate_bias", self.candidate_bias.to(score_dtype(x.dtype)))
        if loss == "sigmoid":
            return module.sigmoid(x, y, scale, bias, **options)
        if loss in ("clip_loss", "nt_xent"):
            return getattr(module, loss)(x, y, scale, **options)
        options["positives"] = self.positives
        if loss == "info_nce":
            return module.info_nce(x, y, scale, **options)
        pair = loss == "decomposable_pair"
        logits = None
        if self.positive_logits is not None:
            logits = tuple(v.to(score_dtype(x.dtype)) for v in self.positive_logits)
            logits = logits if pair else logits[0]
        if self.decomposable.get("shape") is not None:
            options["generator"] = torch.Generator().manual_seed(self.problem.seed)
        normalizer = self.log_normalizer if pair else self.log_normalizer[0]
        return module.decomposable(x, y, scale, normalizer, positive_logits=logits, **self.decomposable, **options)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


COMMON: dict[str, Any] = {"scale": 1.0, "bias": None}

PROBLEMS = (
    Problem("base", "one row more than a vector register, a stripe or the smallest panel holds"),
    # numbers of rows
    Problem("n0", "no rows: 0, not NaN", n=0),
    Problem("n1", "one row has no negatives: softmax losses are 0, gradients too", n=1),
    Problem("n2", "the smallest batch with negatives", n=2),
    Problem("n3", "shorter than every vector register", n=3),
    Problem("n63", "one less than a stripe of rows", n=63),
    Problem("n64", "exactly one stripe", n=64),
    Problem("panels", "one more than a multiple of every block: five by five panels, ragged both ways",
            n=257, small_panels=True),
    Problem("kept-panels", "panels of scores that are few enough to be kept",
            n=257, d=1000, workspace_bytes=16 * 257**2),
    Problem("n550", "more scores than one call takes: a band, of all rows where columns have normalisers too",
            n=550, d=16, losses=("info_nce", "clip_loss", "sigmoid", *DECOMPOSABLE)),
    # rectangles
    Problem("kept-wide", "three panels of kept scores on a CPU", m=2600, d=24, workspace_bytes=16 * 65 * 2600,
            losses=ONE_WAY),
    Problem("wide-panels", "panels of a rectangle", n=130, m=257, small_panels=True, losses=ONE_WAY),
    Problem("many-panels", "sums over 40 panels: 16-bit ones would have lost their digits",
            m=2600, d=24, temperature=1.0, features="common", small_panels=True, losses=ONE_WAY),
    Problem("no-rows", "no anchors, but candidates: their gradient is 0", n=0, m=5, losses=ONE_WAY),
    Problem("one-row", "one anchor against a corpus", n=1, m=257, losses=ONE_WAY),
    Problem("offset-panels", "the excluded diagonal crosses panels",
            n=130, m=257, positives=100, small_panels=True, losses=ONE_WAY),
    Problem("index", "rows share positives; fewer candidates than anchors",
            n=130, m=33, positives="index", losses=ONE_WAY),
    Problem("index-panels", "shared positives across panels",
            n=257, m=130, positives="index", small_panels=True, losses=ONE_WAY),
    # numbers of features
    Problem("d1", "scores are products of two numbers", d=1),
    Problem("d7", "odd, and less than a register", d=7),
    Problem("d123", "no multiple of anything: rows are not aligned", d=123),
    Problem("d384", "a text encoder's width", d=384),
    Problem("d768", "a vision transformer's width", d=768),
    Problem("d1000", "wider than the batch is long", d=1000),
    # temperatures and scores
    Problem("warm", "temperature 1: every negative counts", temperature=1.0),
    Problem("t0.01", "CLIP's own clamp, scale 100", temperature=0.01),
    Problem("t0.005", "a fixed maximum of 1/temperature loses every term here", temperature=0.005),
    Problem("t0.001", "logits up to 1000: a sum of exponentials without a maximum overflows", temperature=0.001, n=130),
    Problem("zero-scale", "all logits equal; dscale is a plain sum of scores", scale=0.0),
    Problem("negative-scale", "the largest score becomes the smallest logit", scale=-5.0),
    Problem("nearly-solved", "loss 1e-3: a positive in the stream loses its digits",
            n=257, d=256, scale=13.0, features="solved"),
    Problem("identical", "all rows equal: loss log N, similarity gradients cancel", features="identical"),
    Problem("equal-summands", "gradients of 0 made of 260 equal numbers, which round alike",
            n=130, d=2, scale=0.03, features="identical"),
    Problem("all-negative", "every score near -1: a maximum of 0 would underflow",
            temperature=0.005, features="opposed"),
    Problem("unnormalised", "rows of norm 8, logits of hundreds", temperature=0.07, features="normal"),
    Problem("huge", "rows of norm 3000, logits of millions: every softmax is one-hot", scale=1.0, features="huge"),
    Problem("outliers", "rows and columns with normalisers far apart: no common reference serves",
            n=130, scale=1.0, features="outliers"),
    Problem("siglip-start", "SigLIP's initial scale and bias", scale=10.0, bias=-10.0, losses=("sigmoid",)),
    # a large common part: log-sum-exps of one rounded number lose what matters
    Problem("equal-1e4", "eight equal logits: log 8", n=8, features="equal", length=100.0, **COMMON),
    Problem("equal-1e6", "the same", n=8, features="equal", length=1000.0, **COMMON),
    Problem("equal-1e8", "the same, where float32 counts by eights", n=8, features="equal", length=10240.0, **COMMON),
    Problem("common-100", "logits of 1e4 that differ by one: dscale is a small difference",
            features="shifted", length=100.0, **COMMON),
    Problem("common-256", "logits of 65,536 that differ by one", features="shifted", length=256.0, **COMMON),
    Problem("common-100-panels", "the same in panels", n=130, features="shifted", length=100.0, small_panels=True,
            **COMMON),
    Problem("common-index", "the same, positives shared and anywhere", n=130, m=33, features="shifted", length=100.0,
            positives="index", losses=ONE_WAY, **COMMON),
    Problem("common-block", "given positive logits of that size",
            features="shifted", length=100.0, block="all", scale=1.0, losses=DECOMPOSABLE),
    # memory layouts
    Problem("transposed", "features by columns", layout="transposed"),
    Problem("misaligned", "columns of a wider matrix from an odd offset", layout="misaligned"),
    Problem("strided", "every other row", layout="strided", small_panels=True, n=130),
    Problem("expanded", "one stored row seen many times: stride 0", layout="expanded"),
    # weights
    Problem("sparse-weights", "a weighted mean divides by the weights; rows of weight 0 give no gradient",
            n=130, weight="sparse", small_panels=True),
    Problem("zero-weights", "a mean of nothing is 0, not NaN", n=3, weight="zero"),
    # ids
    Problem("ids", "pairs of equal ids are no negatives; several positives of the sigmoid loss", ids="shared"),
    Problem("ids-panels", "the same across panels", n=257, ids="shared", small_panels=True),
    Problem("ids-band", "the same in a band, of all rows where columns have normalisers too",
            n=550, d=16, ids="shared", losses=("info_nce", "clip_loss", "sigmoid", *DECOMPOSABLE)),
    Problem("ids-kept", "the same with kept scores", n=257, d=1000, ids="shared", workspace_bytes=16 * 257**2),
    Problem("ids-wide", "candidates of a corpus, some with a row's id",
            n=130, m=257, positives=100, ids="shared", small_panels=True, losses=ONE_WAY),
    Problem("ids-sigmoid-wide", "more texts than images, some rows with no positive",
            n=33, m=150, ids="shared", weight="sparse", losses=("sigmoid",)),
    Problem("ids-index", "shared positives, whose ids are others", n=130, m=33, positives="index", ids="shared",
            losses=ONE_WAY),
    Problem("ids-solved", "few wrong pairs are left, and only some of them count",
            n=257, d=256, scale=13.0, features="solved", ids="shared"),
    Problem("ids-far-apart", "rows and columns with normalisers far apart",
            n=130, scale=1.0, features="outliers", ids="shared"),
    Problem("ids-equal", "no negatives: softmax losses are 0, gradients too", n=33, ids="equal"),
    # what is added to the candidates' logits
    Problem("candidate-bias", "log q, say, with its gradient", candidate_bias="normal", losses=BIASED),
    Problem("padded", "some candidates are padding, and so are some rows' positives",
            n=130, ids="shared", weight="sparse", candidate_bias="padded", small_panels=True, losses=BIASED),
    Problem("padded-kept", "the same with kept scores",
            n=257, d=1000, candidate_bias="padded", workspace_bytes=16 * 257**2, losses=BIASED),
    Problem("padded-index", "the same with shared positives", n=130, m=33, positives="index", candidate_bias="padded",
            losses=ONE_WAY),
    Problem("padded-wide", "more texts than images", n=33, m=150, ids="shared", candidate_bias="padded",
            losses=("sigmoid",)),
    Problem("biased-block", "given positive logits, which have no bias", block="all", candidate_bias="padded",
            losses=("decomposable",)),
    Problem("biased-zero-scale", "the biases' gradient does not come of the scores'",
            scale=0.0, candidate_bias="normal", losses=BIASED),
    # denominators without the positive
    Problem("dcl-softmax", "no positive in the denominator: the loss may be negative",
            include_positive=False, losses=SOFTMAX),
    Problem("dcl-panels", "the same in panels, of some pairs", n=257, include_positive=False, ids="shared",
            weight="sparse", small_panels=True, losses=SOFTMAX),
    Problem("dcl-band", "the same in bands", n=550, d=16, include_positive=False, losses=("info_nce", "clip_loss")),
    Problem("dcl-solved", "a nearly solved batch: it goes on", n=257, d=256, scale=13.0, features="solved",
            include_positive=False, losses=SOFTMAX),
    Problem("dcl-common", "logits of 1e4 that differ by one", features="shifted", length=100.0,
            include_positive=False, losses=SOFTMAX, **COMMON),
    Problem("dcl-padded", "with biases of the candidates, and padding",
            n=130, include_positive=False, candidate_bias="padded", losses=SOFTMAX),
    # candidates above the positive are left out
    Problem("margin", "of rows and of columns, each by its own positive", margin=-4.0, losses=RATIOS),
    Problem("margin-relative", "by dot products", n=130, margin=("relative", -0.6), weight="sparse", losses=RATIOS),
    Problem("margin-panels", "across panels, beside ids", n=257, ids="shared", margin=-4.0, small_panels=True,
            losses=RATIOS),
    Problem("margin-band", "in bands", n=550, d=16, margin=-3.0,
            losses=("info_nce", "clip_loss", "decomposable_pair")),
    Problem("margin-kept", "with kept scores", n=257, d=1000, margin=-6.0, workspace_bytes=16 * 257**2,
            losses=("info_nce", "clip_loss")),
    Problem("margin-index", "positives anywhere", n=130, m=33, positives="index", margin=-2.0, losses=ONE_WAY),
    Problem("margin-dcl", "no positive in the denominator either", n=130, margin=-5.0, include_positive=False,
            losses=SOFTMAX),
    Problem("margin-padded", "biases do not count for it", n=130, margin=-4.0, candidate_bias="padded",
            losses=("info_nce", "clip_loss", "nt_xent", "decomposable")),
    Problem("margin-far-apart", "normalisers far apart", n=33, scale=1.0, margin=("relative", 0.1),
            features="outliers", losses=RATIOS),
    Problem("margin-common", "logits of 1e4 that differ by one", n=7, features="shifted", length=100.0, margin=-1.0,
            losses=RATIOS, **COMMON),
    Problem("margin-alone", "all are left out: 0", n=33, margin=-1e6, losses=SOFTMAX),
    Problem("margin-block", "above given logits", block="some", m=33, margin=-9.0, losses=("decomposable",)),
    # those that a guide finds more alike
    Problem("guide", "of rows and of columns", guide=0.5, weight="sparse", losses=SOFTMAX),
    Problem("guide-panels", "across panels, beside ids and a margin", n=257, ids="shared", margin=-4.0,
            guide=("relative", 0.25), small_panels=True, losses=SOFTMAX),
    Problem("guide-band", "in bands", n=550, d=16, guide=-2.5, include_positive=False, losses=SOFTMAX[:2]),
    Problem("guide-kept", "no scores are kept", n=257, d=1000, guide=1.5, workspace_bytes=16 * 257**2, losses=SOFTMAX),
    Problem("guide-padded", "biases of both sides", n=130, candidate_bias="padded", guide=0.5, losses=SOFTMAX),
    Problem("guide-far-apart", "what it leaves out lies far above the rest, which weighs 1", n=130, scale=1.0,
            guide=3.5, features="outliers", include_positive=False, losses=SOFTMAX),
    Problem("guide-alone", "all are left out: 0", n=33, guide=100.5, losses=SOFTMAX),
    Problem("dcl-alone", "no negatives: 0", n=5, include_positive=False, ids="equal", losses=SOFTMAX),
    # a share of the target lies on all candidates
    Problem("smoothed", "in one call of a backend without it", label_smoothing=0.1, losses=SOFTMAX),
    Problem("smoothed-panels", "of some pairs, in panels", n=257, ids="shared", weight="sparse", small_panels=True,
            label_smoothing=0.1, losses=SOFTMAX),
    Problem("smoothed-band", "in bands", n=550, d=16, label_smoothing=0.2, losses=("info_nce", "clip_loss")),
    Problem("smoothed-solved", "a nearly solved batch: softmax and target cancel", n=257, d=256, scale=13.0,
            features="solved", label_smoothing=0.002, losses=SOFTMAX),
    Problem("smoothed-common", "logits of 1e4 that differ by one", features="shifted", length=100.0,
            label_smoothing=0.1, losses=SOFTMAX, **COMMON),
    Problem("smoothed-wide", "positives anywhere, whose ids are others, among padding", n=130, m=33, positives="index",
            ids="shared", candidate_bias="padded", label_smoothing=0.3, losses=("info_nce",)),
    Problem("smoothed-padded", "biases of both sides", n=130, candidate_bias="padded", label_smoothing=1.0,
            losses=("info_nce", "clip_loss")),
    Problem("smoothed-alone", "no negatives: 0", n=5, ids="equal", label_smoothing=0.1, losses=SOFTMAX),
    Problem("ids-different", "nothing is left out, and the sigmoid loss has no positives", n=33, ids="different"),
    # the decomposable loss
    Problem("stale-panels", "normalisers too large", n=257, staleness=2.0, small_panels=True, losses=DECOMPOSABLE),
    Problem("rather-stale", "weights sixty times their gains: 16-bit ones need the room",
            staleness=-4.0, losses=DECOMPOSABLE),
    Problem("very-stale", "u Z = e^80: close to the largest number",
            staleness=-80.0, temperature=1.0, float16=False, losses=DECOMPOSABLE),
    Problem("drawn", "u from its exact conditional distribution", decomposable=(("shape", 1.0),), losses=DECOMPOSABLE),
    Problem("drawn-wide", "a small shape: u close to 0", decomposable=(("shape", 0.3),), losses=DECOMPOSABLE),
    Problem("dcl", "no positive in the denominator", decomposable=(("positive_constant", 0.0),), losses=DECOMPOSABLE),
    Problem("rescaled", "K / B of 2.5", decomposable=(("negative_scale", 2.5),), losses=DECOMPOSABLE),
    Problem("block", "columns that hold nobody's positive", block="all", losses=DECOMPOSABLE),
    Problem("part-block", "columns that hold some rows' positives", m=33, block="some", losses=("decomposable",)),
)  # fmt: skip

BY_NAME = {problem.name: problem for problem in PROBLEMS}


@cache
def make_inputs(problem: Problem, dtype: torch.dtype) -> Inputs:
    """The problem's arguments; features in `dtype`, the rest in the dtype of scores."""
    g = torch.Generator().manual_seed(problem.seed)
    x, y = (lay_out(v.to(dtype), problem.layout) for v in features_of(problem, g))
    n, m, score = len(x), len(y), score_dtype(dtype)
    positives = problem.positives
    if positives == "index":
        positives = torch.randint(m, (n,), generator=g)
    inputs = Inputs(
        problem,
        x,
        y,
        scale=torch.tensor(problem.logit_scale, dtype=score),
        bias=torch.tensor(problem.logit_bias, dtype=score),
        positives=positives,
        weight=weights_of(problem, g),
        ids=ids_of(problem, n, m, g),
        candidate_bias=biases_of(problem, m, g),
        guide=guide_of(problem, n, m, dtype),
        decomposable=dict(problem.decomposable),
    )
    if problem.block is not None:
        inputs.positive_logits = tuple(
            torch.randn(k, generator=g).mul(0.1).add(0.5 + problem.length**2).mul(inputs.scale) for k in (n, m)
        )
        if problem.block == "some":
            index = torch.arange(n)
            inputs.positives = torch.where(index < m, index, -1)
    if problem.margin is not None:
        inputs.margin = margin_of(inputs)
    if set(problem.losses) & set(DECOMPOSABLE):
        inputs.log_normalizer = normalizers_of(inputs, g)
    return inputs


#: The arguments that a loss has gradients to.
def differentiable(loss: str) -> tuple[str, ...]:
    """Names of the arguments that take gradients."""
    return ("x", "y", "scale", "bias") if loss == "sigmoid" else ("x", "y", "scale")


def upstream_like(value: Tensor, seed: int) -> Tensor:
    """A random upstream gradient in the value's shape, float64."""
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def run(
    module: Any,
    inputs: Inputs,
    loss: str,
    dtype: torch.dtype,
    needs: tuple[str, ...] | None = None,
    **options: Any,
) -> Outcome:
    """The loss of `module` on the inputs in `dtype` (a layout is kept where it is their own), forward and backward."""
    names = (*differentiable(loss), "candidate_bias") if needs is None else needs
    features = {"x": inputs.x, "y": inputs.y}
    if dtype != inputs.x.dtype:
        features = {name: v.to(dtype) for name, v in features.items()}
    scalars = {name: v.to(score_dtype(dtype)) for name, v in (("scale", inputs.scale), ("bias", inputs.bias))}
    leaves = {name: v.detach().requires_grad_(name in names) for name, v in (features | scalars).items()}
    biased = {}
    if inputs.candidate_bias is not None:
        bias = inputs.candidate_bias.to(score_dtype(dtype)).detach().clone()
        biased = {"candidate_bias": bias.requires_grad_("candidate_bias" in names)}
    value = inputs.call(module, loss, *leaves.values(), **biased, **options)
    upstream = upstream_like(value, inputs.problem.seed).to(value)
    leaves |= biased
    if value.requires_grad:
        torch.autograd.backward(value, upstream)
    return Outcome(value.detach(), {name: leaf.grad for name, leaf in leaves.items()})


def engine_options(inputs: Inputs, loss: str, backend: str) -> dict[str, Any]:
    """backend and workspace_bytes for a run of the package."""
    options: dict[str, Any] = {"backend": backend}
    problem = inputs.problem
    if problem.small_panels:
        options |= smallest_panels(inputs, loss, backend)
    elif problem.workspace_bytes is not None:
        options["workspace_bytes"] = problem.workspace_bytes
    return options


def smallest_panels(inputs: Inputs, loss: str, backend: str) -> dict[str, Any]:
    """The smallest workspace_bytes."""
    dtype = inputs.x.dtype
    return {
        "workspace_bytes": smallest_workspace(
            lambda size: run(contrastive_kernels, inputs, loss, dtype, backend=backend, workspace_bytes=size)
        )
    }
