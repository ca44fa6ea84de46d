"""The latent structures on drawn features, put in drawn ways, against their double sums in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from asked import Normalizing, assert_near, settings_of, workspace_of
from drawn import FEATURES, LAYOUTS, ROWS, Way, ways_of
from fuzzing import fuzzed
from hypothesis import strategies as st
from problems import lay_out, score_dtype
from tolerance import LOGIT_UNITS, UNITS
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.reference import structure as reference

#: Features in the order of their arguments, which are views (None among them: left out), and further options.
FUNCTIONS = {
    "geometric_consistency": (("image", "text"), ("image_aug", "text_aug"), ("cross", "intra", "augmented")),
    "brownian_bridge": (("image", "text"), ("image_aug", "text_aug"), ()),
    "feature_separation": (
        ("image", "text", "image_independent", "text_independent"),
        ("image_independent_aug", "text_independent_aug"),
        ("orthogonality", "contrast", "uniformity"),
    ),
    "multimodal_contrastive": (("image", "text"), ("image_aug", "text_aug"), ()),
}
SCALED = ("feature_separation", "multimodal_contrastive")


@dataclass(frozen=True)
class Structure:
    """Which one, of what."""

    function: str
    n: int
    d: int
    kind: str
    layout: str
    #: the views that are there, and the arguments that require gradients
    views: tuple[str, ...]
    needs: tuple[str, ...]
    options: tuple[tuple[str, float], ...]
    scale: float
    seed: int

    def features(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By argument [N, D]."""
        g = torch.Generator().manual_seed(self.seed)
        plain, _, _ = FUNCTIONS[self.function]
        made: dict[str, Tensor] = {}
        for name in (*plain, *self.views):
            v = torch.randn(self.n, self.d, generator=g, dtype=torch.float64)
            first = next(iter(made.values()), v)
            match self.kind:
                case "aligned":
                    v = first + 0.1 * v
                case "equal":
                    v = first
                case "identical":
                    v = first[:1].expand(self.n, self.d)
                case "opposed":
                    v = -first if len(made) % 2 else first
                case "zero":
                    v = v * (torch.arange(self.n)[:, None] % 2)
            made[name] = v if self.kind == "unnormalised" else torch.nn.functional.normalize(v, dim=1)
        return {name: lay_out(v.to(dtype), self.layout) for name, v in made.items()}


@st.composite
def structures(draw: Any) -> Structure:
    """A structure of drawn features."""
    function = draw(st.sampled_from(sorted(FUNCTIONS)))
    plain, views, weights = FUNCTIONS[function]
    there = tuple(name for name in views if draw(st.booleans()))
    if function == "brownian_bridge":
        there = there or views[:1]
        options = [("t", draw(st.sampled_from((0.0, 0.25, 0.6, 1.0))))]
    else:
        options = [(name, draw(st.sampled_from((1.0, 0.0, 0.25, 3.0)))) for name in weights]
    return Structure(
        function,
        n=draw(st.sampled_from(ROWS)),
        d=draw(st.sampled_from(FEATURES)),
        kind=draw(st.sampled_from(("random", "aligned", "equal", "identical", "opposed", "zero", "unnormalised"))),
        layout=draw(st.sampled_from(LAYOUTS[:-1])),
        views=there,
        needs=tuple(name for name in (*plain, *there, "scale") if draw(st.integers(0, 3))),
        options=tuple(options),
        scale=draw(st.sampled_from((1e-3, 1.0, 14.3, 100.0, 0.0, -3.0))),
        seed=draw(st.integers(0, 2**16)),
    )


class Case:
    """The structure's arguments in a dtype."""

    def __init__(self, structure: Structure, way: Way) -> None:
        self.structure, self.way = structure, way
        self.features = structure.features(way.dtype)
        self.scale = torch.tensor(structure.scale, dtype=score_dtype(way.dtype))

    def run(self, module: Any, dtype: torch.dtype | None, **more: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Value and gradients of a module, in a dtype (None: as they are asked with)."""
        s, needs = self.structure, self.structure.needs
        leaves = {name: v.detach().requires_grad_(name in needs) for name, v in self.features.items()}
        scale = self.scale.clone().requires_grad_("scale" in needs)
        given = dict(leaves)
        if dtype is not None:
            unit = Normalizing(self.way.dtype).unit if self.way.normalize else lambda v: v
            leaves = {name: v.detach().to(dtype).requires_grad_(name in needs) for name, v in leaves.items()}
            scale = self.scale.detach().to(dtype).clone().requires_grad_("scale" in needs)
            given = {name: unit(v) for name, v in leaves.items()}
        _, views, _ = FUNCTIONS[s.function]
        given |= {name: None for name in views if name not in given}
        if s.function in SCALED:
            given["logit_scale"] = scale
        value = getattr(module, s.function)(**given, **dict(s.options), **more)
        if value.requires_grad:
            value.backward()
        return value.detach(), {name: leaf.grad for name, leaf in (leaves | {"scale": scale}).items()}

    def ask(self, size: int | None = None) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The package's answer."""
        more: dict[str, Any] = {"normalize": self.way.normalize}
        if self.structure.function in SCALED:
            more |= {"backend": self.way.backend} | ({} if size is None else {"workspace_bytes": size})
        return self.run(ck, None, **more)

    def sizes(self) -> tuple[float, float]:
        """What roundings of the value and of a feature's gradient are relative to: lengths, and weights of pairs."""
        s, n = self.structure, max(self.structure.n, 1)
        top = max((v.double().norm(dim=1).max().item() for v in self.features.values()), default=0.0) if s.n else 0.0
        top = 1.0 if self.way.normalize else top
        weight = max(1.0, *(value for _, value in s.options)) if s.options else 1.0
        logits = LOGIT_UNITS / UNITS * abs(s.scale) * top**2
        contrast = abs(s.scale) * top * (1 + logits) * self.heaviest()
        match s.function:
            case "geometric_consistency":
                return weight * 4 * n * top**4, weight * 16 * top**3
            case "brownian_bridge":
                return (1 + top) ** 2, (1 + top) / n
            case "multimodal_contrastive":
                return 1 + logits, contrast
        kernels = LOGIT_UNITS / UNITS * 4 * top**2
        value = weight * (2 * top**4 + 1 + 2 * logits + kernels)
        return value, weight * (4 * top**3 / n + contrast + 16 * top * (1 + kernels))

    def heaviest(self) -> float:
        """The largest sum of |dL/dz| of a row or column."""
        s, largest = self.structure, 0.0
        pairs = [("image", "text"), ("text", "image"), ("image", "image_aug"), ("text", "text_aug")]
        pairs += [(f"{name}_independent", f"{name}_independent_aug") for name in ("image", "text")]
        for pair in pairs:
            if s.function in SCALED and set(pair) <= set(self.features) and s.n:
                x, y = (self.features[name].double() for name in pair)
                x, y = (torch.nn.functional.normalize(v, dim=1) if self.way.normalize else v for v in (x, y))
                w = (torch.softmax(s.scale * x @ y.T, 1) - torch.eye(s.n)).abs() / s.n
                largest = max(largest, w.sum(0).max().item(), w.sum(1).max().item())
        return largest


@fuzzed(30, structure=structures(), way=ways_of())
def test_structures(structure, way):
    """Value and gradients of every structure."""
    way = replace(way, normalize=way.normalize and structure.kind != "zero")  # the truth of 0 / 0 is the package's own
    case = Case(structure, way)
    with settings_of(way):
        workspace = workspace_of(way, case.ask) if structure.function in SCALED and structure.n else None
        value, gradients = case.ask(workspace)
    truth, true_gradients = case.run(reference, torch.float64)
    plain, plain_gradients = case.run(reference, score_dtype(way.dtype))
    score_eps, eps = torch.finfo(score_dtype(way.dtype)).eps, torch.finfo(way.dtype).eps
    # (float64's truth has roundings of its own)
    size, steepness = (4 * number if way.dtype == torch.float64 else number for number in case.sizes())
    assert value.dtype == score_dtype(way.dtype)
    assert_near("value", value, truth, (plain.double() - truth).abs(), torch.tensor(UNITS * score_eps * size).double())
    for name, want in true_gradients.items():
        if want is None or gradients[name] is None:  # terms of weight 0 are not computed
            assert gradients[name] is None and (want is None or not want.any()), f"d{name}"
            continue
        dtype = value.dtype if name == "scale" else way.dtype
        assert gradients[name].dtype == dtype
        floor = UNITS * (score_eps * size * structure.n if name == "scale" else eps * steepness)
        error = (plain_gradients[name].to(dtype).double() - want).abs()
        assert_near(f"d{name}", gradients[name], want, error, torch.tensor(floor).double())


WEIGHTS = st.sampled_from((0.0, 0.5, 2.0))


@fuzzed(
    20,
    n=st.sampled_from(ROWS),
    d=st.sampled_from(FEATURES),
    weights=st.fixed_dictionaries(dict.fromkeys(("separation", "bridge", "geometry"), WEIGHTS)),
    views=st.sets(st.sampled_from(("image_aug", "text_aug", "image_independent_aug", "text_independent_aug"))),
    scales=st.tuples(st.sampled_from((0.0, 1.0, 14.3)), st.sampled_from((None, 3.0))),
    t=st.sampled_from((0.25, 1.0)),
    cross=st.sampled_from((1.0, 0.25)),
)
def test_latent_structure_loss(n, d, weights, views, scales, t, cross):
    """The module: the base loss and the weighted structures, and each of them by its name."""
    g = torch.Generator().manual_seed(n + 1000 * d)
    names = ("image", "text", "image_independent", "text_independent", *sorted(views))
    given = {name: torch.randn(n, d, generator=g, dtype=torch.float64).requires_grad_() for name in names}
    scale, own = (None if s is None else torch.tensor(s, dtype=torch.float64).requires_grad_() for s in scales)
    v, u, va, ua = (given.get(name) for name in ("image", "text", "image_aug", "text_aug"))
    if va is None and ua is None:
        weights = weights | {"bridge": 0.0}
    options = {"bridge_options": {"t": t}, "geometry_options": {"cross": cross}}
    loss = ck.LatentStructureLoss(**weights, **options)
    found = loss(
        v, u, scale, independent_logit_scale=own, **{k: x for k, x in given.items() if k not in ("image", "text")}
    )
    want = {"base": reference.multimodal_contrastive(v, u, va, ua, scale)}
    if weights["separation"]:
        independent = [given.get(f"{side}_independent{view}") for view in ("", "_aug") for side in ("image", "text")]
        want["separation"] = reference.feature_separation(v, u, *independent, scale.detach() if own is None else own)
    if weights["bridge"]:
        want["bridge"] = reference.brownian_bridge(v, u, va, ua, t=t)
    if weights["geometry"]:
        want["geometry"] = reference.geometric_consistency(v, u, va, ua, cross=cross)
    assert set(want) == {name for name in found if "/" not in name} - {"loss"}
    for name, value in want.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-9)
    total = sum(weights.get(name, 1.0) * value for name, value in want.items())
    torch.testing.assert_close(found["loss"], total, rtol=1e-9, atol=1e-9)
    leaves = [x for x in (*given.values(), scale, own) if x is not None]
    for a, b in zip(*(torch.autograd.grad(x, leaves, allow_unused=True) for x in (found["loss"], total))):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
