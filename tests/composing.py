"""InfoNCE with members that compose its log-sums: what they are given, the truth, and the floors of the one rule."""

from __future__ import annotations

from typing import Any

import torch
from problems import Inputs, score_dtype
from tolerance import LOGIT_UNITS, UNITS
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels.reference import composed as definitions

#: Every member, or several at once: what is given, and the loss's other arguments.
MEMBERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "several": (("several",), {}),
    "several and all": (("several", "ids", "bias", "weight"), {}),
    "several and queue": (("several", "ids", "queue"), {}),
    "logits": (("logits",), {}),
    "logits, DCL": (("logits", "ids"), {"include_positive": False}),
    "features": (("features", "weight"), {}),
    "features and bias": (("features", "bias"), {"include_positive": False}),
    "queue": (("queue", "ids"), {}),
    "queue, DCL": (("queue",), {"include_positive": False}),
    "queue and features": (("queue", "features"), {}),
    "margin, logits": (("logits", "ids", "bias"), {"margin": -0.5}),
    "margin, features": (("features",), {"margin": ("relative", -0.3), "include_positive": False}),
    "margin, queue": (("queue", "ids"), {"margin": ("relative", -0.3)}),
    "margin, queue, DCL": (("queue",), {"margin": -0.5, "include_positive": False}),
    "weights": (("weights",), {"include_positive": False}),
    "debiased": (("ids",), {"debiased": 0.1}),
    "hard": ((), {"hardness_beta": 0.5}),
    "hard and debiased": (("queue", "ids"), {"hardness_beta": 1.0, "debiased": 0.05}),
}
#: In the queue.
QUEUED = 40
#: Leaves that have the features' dtype.
WIDE = ("x", "y", "features")


class Given:
    """A member's tensors for a problem, as rounded to its dtype."""

    def __init__(self, name: str, inputs: Inputs) -> None:
        self.kinds, self.options = MEMBERS[name]
        x, y = inputs.x, inputs.y
        n, m, g = len(x), len(y), torch.Generator().manual_seed(inputs.problem.seed)
        size = float(y.float().norm(dim=1).mean()) if m else 1.0

        def drawn(*shape: int) -> Tensor:
            v = torch.randn(*shape, generator=g)
            return (size * v / v.norm(dim=-1, keepdim=True).clamp(min=1e-9)).to(x.dtype)

        self.scale, self.leaves = inputs.scale, {"x": x, "y": y}
        # what the features have in common the queue has too
        common = y.float().mean(0) if inputs.problem.length else 0.0
        self.queue = ((common + drawn(QUEUED, x.shape[1])).to(x.dtype), torch.arange(QUEUED) % 7)
        self.weight = torch.rand(n, generator=g)
        if "features" in self.kinds:
            near = x.float() + (0.0 if inputs.problem.length else 0.5 * drawn(n, x.shape[1]).float())
            self.leaves["features"] = near.to(x.dtype)
        if "logits" in self.kinds:
            own = inputs.scale.float() * (x.float() * y[torch.arange(n) % max(m, 1)].float()).sum(1)
            self.leaves["logits"] = own + torch.randn(n, generator=g)
        if "bias" in self.kinds:
            bias = torch.randn(m, generator=g)
            bias[torch.rand(m, generator=g) < 0.2] = -torch.inf
            self.leaves["bias"] = bias
        self.several = torch.randint(-1, m, (n, 3), generator=g)
        self.several[:, 0] = torch.arange(n) % m
        self.several[4::9] = -1
        self.ids = torch.arange(n) % 7, torch.arange(m) % 7
        dots = (x.double() * y[torch.arange(n) % max(m, 1)].double()).sum(1)
        self.row_weights = 2 - n * torch.softmax(dots / (0.5 * size**2), 0)

    def call(
        self, module: Any, leaves: dict[str, Tensor], scale: Tensor, queue: Any, weights: Any, **more: Any
    ) -> Tensor:
        """The loss of rows."""
        options = dict(self.options)
        names = {"features": "positive_features", "logits": "positive_logits", "bias": "candidate_bias"}
        options |= {names[name]: v for name, v in leaves.items() if name in names}
        if "several" in self.kinds:
            options["positives"] = self.several
        if "ids" in self.kinds:
            options["ids"] = self.ids
        if "weight" in self.kinds:
            options["weight"] = self.weight
        if "queue" in self.kinds:
            options["queue"] = queue
        if "weights" in self.kinds:
            options["weight_fn"] = weights
        return module.info_nce(leaves["x"], leaves["y"], scale, reduction="none", **options, **more)

    def found(self, module: Any, dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
        """Value and gradients of a random combination of the rows."""
        score = score_dtype(dtype)
        leaves = {name: v.to(dtype if name in WIDE else score) for name, v in self.leaves.items()}
        leaves = {name: v.detach().clone().requires_grad_() for name, v in leaves.items()}
        scale = self.scale.to(score).detach().clone().requires_grad_()
        queue: Any = (self.queue[0].to(dtype), self.queue[1])
        if module is ck:
            queue = ck.FeatureQueue(QUEUED + 5, queue[0].shape[1], ids=True, dtype=dtype)
            queue.enqueue(self.queue[0], self.queue[1])
        value = self.call(module, leaves, scale, queue, lambda x, y: self.row_weights.to(score), **more)
        upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
        gradients = torch.autograd.grad(value, [*leaves.values(), scale], upstream.to(value), allow_unused=True)
        names = [*leaves, "scale"]
        return {"value": value.detach()} | {n: g for n, g in zip(names, gradients) if g is not None}

    def floors(self, dtype: torch.dtype, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """As those of the losses: roundings of the largest contribution, and of the logits."""
        wide = {name: v.double() for name, v in self.leaves.items()}
        x, y, scale = wide["x"], wide["y"], self.scale.double()
        score_eps, eps = torch.finfo(score_dtype(dtype)).eps, torch.finfo(dtype).eps
        own = (x * wide["features"]).sum(1, keepdim=True) if "features" in wide else x.new_zeros(len(x), 1)
        scores = torch.cat([x @ y.T, x @ self.queue[0].double().T, own], 1)
        # the loss as a function of the logits: every column is a feature, and so is the positive that is no column
        basis = torch.eye(scores.shape[1], dtype=torch.float64)
        m = len(y)
        leaves = {"x": (scale * scores).requires_grad_(), "y": basis[:m]}
        leaves |= {name: wide[name].detach().requires_grad_() for name in ("bias", "logits") if name in wide}
        if "features" in wide:
            leaves["features"] = basis[-1:].expand(len(x), -1)
        queue = basis[m:-1], self.queue[1]
        value = self.call(definitions, leaves, torch.ones(()), queue, lambda x, y: self.row_weights)
        upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
        w = torch.autograd.grad(value, leaves["x"], upstream, retain_graph=True)[0].abs()
        once = torch.autograd.grad(value.sum(), leaves["x"], retain_graph=True)[0].abs()
        partners = torch.cat([y, self.queue[0].double()]).norm(dim=1).expand(len(x), -1)
        lengths = torch.cat([partners, wide.get("features", x).norm(dim=1)[:, None]], 1)
        logit = LOGIT_UNITS * score_eps * scale.abs() * x.norm(dim=1)[:, None] * lengths
        if "bias" in wide:
            logit = logit + LOGIT_UNITS * score_eps * wide["bias"].nan_to_num(neginf=0.0).abs().max()
        if "features" in wide:  # the positive's, which is made apart, is in every weight
            logit = logit + logit[:, -1:]
        found = {}
        of_logits = torch.zeros(len(x), dtype=torch.float64)
        if "logits" in wide:
            of_logits = torch.autograd.grad(value, leaves["logits"], upstream, retain_graph=True)[0].abs()
            found["logits"] = of_logits * (UNITS * score_eps + logit.amax(1)) + UNITS * score_eps
        carried = w * (UNITS * eps + logit)
        largest = max(y.abs().max(), self.queue[0].double().abs().max(), wide.get("features", x).abs().max())
        found["value"] = (
            (once * logit).sum(1) + logit.amax(1) * ("logits" in wide) + UNITS * score_eps * truth["value"].abs()
        )
        found["x"] = (scale.abs() * largest * carried.sum(1))[:, None]
        found["y"] = (scale.abs() * x.abs().max() * carried[:, :m].sum(0))[:, None]
        found["features"] = (scale.abs() * x.abs().max() * carried[:, -1])[:, None]
        found["scale"] = (w * (UNITS * score_eps + logit) * scores.abs()).sum()
        found["bias"] = carried[:, :m].sum(0)  # of the weights, which may be as wide as the features
        return found
