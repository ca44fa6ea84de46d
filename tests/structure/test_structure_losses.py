"""Latent structures as modules, under torch.compile, in bounded memory, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import contrastive_kernels as ck

NAMES = ("image", "text", "image_aug", "text_aug", "image_independent", "text_independent")
NAMES += ("image_independent_aug", "text_independent_aug")


def make(n=10, d=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    return {
        name: normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype).requires_grad_()
        for name in NAMES
    }


def split(features):
    """(image, text), and the rest by name."""
    return (features["image"], features["text"]), {k: v for k, v in features.items() if k not in ("image", "text")}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    features = make()
    (image, text), rest = split(features)
    loss = ck.LatentStructureLoss(
        None, 0.3, 0.2, 0.1,
        separation_options={"uniformity": 0.5}, bridge_options={"t": 0.4}, geometry_options={"intra": 0.0},
    )  # fmt: skip
    out = loss(image, text, 5.0, **rest)
    views = features["image_aug"], features["text_aug"]
    base = ck.multimodal_contrastive(image, text, *views, 5.0)
    separation, terms = ck.feature_separation(
        image, text, *(features[name] for name in NAMES[4:]), 5.0, uniformity=0.5, return_terms=True
    )
    bridge = ck.brownian_bridge(image, text, *views, t=0.4)
    geometry = ck.geometric_consistency(image, text, *views, intra=0.0)
    want = {"base": base, "separation": separation, "bridge": bridge, "geometry": geometry}
    want |= {f"separation/{name}": value for name, value in terms.items()}
    assert set(out) == {"loss", *want}
    for name, value in want.items():
        torch.testing.assert_close(out[name], value.detach())
        assert not out[name].requires_grad, "for logging"
    total = base + 0.3 * separation + 0.2 * bridge + 0.1 * geometry
    torch.testing.assert_close(out["loss"], total)
    ours = torch.autograd.grad(out["loss"], list(features.values()))
    for a, b in zip(ours, torch.autograd.grad(total, list(features.values()))):
        torch.testing.assert_close(a, b)


def test_separation_leaves_the_base_its_temperature():
    (image, text), rest = split(make())
    loss, scale, own = (
        ck.LatentStructureLoss(separation=1.0),
        *(torch.tensor(s, dtype=torch.float64) for s in (5.0, 3.0)),
    )
    scale.requires_grad_()
    own.requires_grad_()
    base = ck.multimodal_contrastive(image, text, rest["image_aug"], rest["text_aug"], scale)
    (want,) = torch.autograd.grad(base, scale)
    (ours,) = torch.autograd.grad(loss(image, text, scale, **rest)["loss"], scale)
    torch.testing.assert_close(ours, want)
    out = loss(image, text, scale, **rest, independent_logit_scale=own)
    ours, of_its_own = torch.autograd.grad(out["loss"], (scale, own))
    torch.testing.assert_close(ours, want)
    separation = ck.feature_separation(image, text, *(rest[name] for name in NAMES[4:]), own)
    torch.testing.assert_close(out["separation"], separation.detach())
    torch.testing.assert_close(of_its_own, torch.autograd.grad(separation, own)[0])


def test_a_weight_of_zero_leaves_a_part_out():
    (image, text), _ = split(make())
    out = ck.LatentStructureLoss()(image, text, 5.0)
    assert set(out) == {"loss", "base"}
    torch.testing.assert_close(out["loss"], ck.clip_loss(image, text, 5.0))
    out = ck.LatentStructureLoss(geometry=1.0)(image, text, 5.0)
    torch.testing.assert_close(out["geometry"], ck.geometric_consistency(image, text).detach())


@pytest.mark.parametrize("base", [ck.ClipLoss(), ck.clip_loss, lambda x, y, scale: (scale * x * y).sum()])
def test_any_base(base):
    (image, text), rest = split(make())
    out = ck.LatentStructureLoss(base, bridge=0.5)(image, text, 5.0, **rest)
    torch.testing.assert_close(out["base"], base(image, text, 5.0).detach())


def test_parameters_of_the_base_are_the_losss():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, image, text, logit_scale):
            return ck.clip_loss(image, text, self.scale)

    loss = ck.LatentStructureLoss(Base(), geometry=1.0)
    (image, text), _ = split(make())
    loss(image, text, None)["loss"].backward()
    assert [name for name, _ in loss.named_parameters()] == ["base.scale"]
    assert loss.base.scale.grad.abs() > 0


@pytest.mark.parametrize(
    "module",
    [
        ck.MultimodalContrastiveLoss(normalize=True),
        ck.LatentStructureLoss(None, 1.0, 1.0, 1.0, bridge_options={"t": 0.5}),
        ck.SeparationHead(6, 3, hidden_features=4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_copy_and_pickle(module):
    (image, text), rest = split(make(dtype=torch.float32))

    def run(module):
        if isinstance(module, ck.SeparationHead):
            return module(image)
        if isinstance(module, ck.MultimodalContrastiveLoss):
            return module(image, text, 5.0, rest["image_aug"], rest["text_aug"])
        return module(image, text, 5.0, **rest)["loss"]

    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)):
        assert torch.equal(run(other), run(module))
    assert "=" in repr(module)


def test_separation_head():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 6)
    for hidden in (None, 7):
        head = ck.SeparationHead(6, 3, hidden_features=hidden)
        out = head(features)
        assert out.shape == (2, 5, 3)
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 5))
        sizes = [p.numel() for p in head.parameters()]
        assert sizes == ([18, 3] if hidden is None else [42, 7, 21, 3])
    linear = ck.SeparationHead(6, 3)
    torch.testing.assert_close(linear(2 * features + 0), normalize(linear.layers(2 * features), dim=-1))


# ---- torch.compile ----


class TestCompile:
    @pytest.fixture(autouse=True)
    def poison(self):
        """Off here: the compiler would trace it."""
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def assert_same(function, sizes, recompilations):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in sizes:
            leaves = list(make(n, 16, torch.float32).values())
            want = function(*leaves)
            with torch._dynamo.config.patch(error_on_recompile=n not in recompilations):
                ours = compiled(*leaves)
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
            gradients = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (ours, want))
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_one_graph_for_every_batch_size(self):
        loss = ck.LatentStructureLoss(None, 0.3, 0.2, 0.1, geometry_options={"cross": 0.5})

        def train(image, text, *rest):
            return loss(image, text, 5.0, **dict(zip(NAMES[2:], rest)))["loss"]

        self.assert_same(train, (7, 9), (7,))

    def test_geometry_has_one_graph_per_side_of_its_choice(self):
        self.assert_same(lambda image, text, *rest: ck.geometric_consistency(image, text), (7, 9, 40), (7, 40))


# ---- refusals ----

X, LONG, WIDE = torch.eye(4, 3), torch.eye(6, 3), torch.eye(4, 5)
GEO, BRIDGE = ck.geometric_consistency, ck.brownian_bridge


@pytest.mark.parametrize(
    "name, expected, came, function, arguments, options",
    [
        ("text", "tensor", "NoneType", GEO, (X, None), {}),
        ("image", "tensor", "list", GEO, ([1.0], X), {}),
        ("image and text", "same number of rows", "4 and 6", GEO, (X, LONG), {}),
        ("image and text_aug", "same number of features", "3 and 5", GEO, (X, X, None, WIDE), {}),
        ("image and image_aug", "one dtype", "float64", GEO, (X, X, X.double()), {}),
        ("cross", "number", "str", GEO, (X, X), {"cross": "1"}),
        ("intra", "at least 0", "-1", GEO, (X, X), {"intra": -1.0}),
        ("augmented", "finite", "nan", GEO, (X, X), {"augmented": float("nan")}),
        ("image_aug, text_aug", "at least one", "None", BRIDGE, (X, X), {}),
        ("t", "[0, 1]", "1.5", BRIDGE, (X, X, X), {"t": 1.5}),
        ("t", "number", "str", BRIDGE, (X, X, X), {"t": "drawn"}),
        ("image and text_aug", "same number of rows", "4 and 6", BRIDGE, (X, X, None, LONG), {}),
        ("text_independent", "[N, D]", "[3]", ck.feature_separation, (X, X, X, X[0], None, None, 1.0), {}),
        ("uniformity", "at least 0", "-2", ck.feature_separation, (X, X, X, X, X, X, 1.0), {"uniformity": -2}),
        ("backend", "one of", "'fast'", ck.feature_separation, (X, X, X, X, X, X, 1.0), {"backend": "fast"}),
        ("image and image_aug", "same number of rows", "4 and 6", ck.multimodal_contrastive, (X, X, LONG, X, 1.0), {}),
        ("logit_scale", "float", "str", ck.multimodal_contrastive, (X, X, X, X, "1"), {}),
        ("separation", "number", "str", ck.LatentStructureLoss, (None, "1"), {}),
        ("bridge", "at least 0", "-1", ck.LatentStructureLoss, (), {"bridge": -1}),
        ("base", "loss module", "int", ck.LatentStructureLoss, (3,), {}),
        ("base", "scalar tensor", "dict", ck.LatentStructureLoss(lambda *_: {}), (X, X, 1.0), {}),
        ("image_independent, text_independent", "tensors", "None", ck.LatentStructureLoss(separation=1.0),
         (X, X, 1.0), {"image_independent": X}),
        ("image_aug, text_aug", "at least one", "None", ck.LatentStructureLoss(bridge=1.0), (X, X, 1.0), {}),
        ("workspace_bytes", "positive", "0", ck.MultimodalContrastiveLoss, (), {"workspace_bytes": 0}),
    ],
)  # fmt: skip
def test_refusals(name, expected, came, function, arguments, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    asked, _, got = message.partition("got")
    assert expected in asked and came in got, message
