"""A step in chunks is the plain step: every parameter's gradient, whatever the encoders draw and the chunks' sizes."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import contrastive_kernels as ck

N, D = 23, 6


class Towers(nn.Module):
    """Two towers and a scale."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.Dropout(dropout))
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return ck.clip_loss(x, y, self.log_scale.exp(), normalize=True)


def towers(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Towers:
    torch.manual_seed(0)
    return Towers(dropout).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, D, generator=g).to(dtype), torch.randn(n, D, generator=g).to(dtype)


def in_chunks(encoder: Callable[[Any], Tensor], value: Tensor, size: int) -> Tensor:
    """All features with their graph: what is compared with."""
    return torch.cat([encoder(part) for part in value.split(size)])


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def plain(model: Towers, size: int, x: Tensor, y: Tensor) -> Tensor:
    value = model.loss(in_chunks(model.image, x, size), in_chunks(model.text, y, size))
    value.backward()
    return value.detach()


def cached(model: Towers, size: Any, x: Any, y: Any, **more: Any) -> Tensor:
    return ck.cached_step((model.image, model.text), (x, y), model.loss, chunk_size=size, **more)


def deferred(model: Towers, size: Any, x: Any, y: Any) -> Tensor:
    value = ck.cached_loss((model.image, model.text), (x, y), model.loss, chunk_size=size)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("step", [cached, deferred])
@pytest.mark.parametrize("size", [1, 7, 12, 23, 64])
def test_every_gradient_is_the_plain_steps(step, size):
    one, other = towers(), towers()
    wanted = plain(one, N, *batch())
    torch.testing.assert_close(step(other, size, *batch()), wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)


def test_float32():
    """As far from float64 as the plain step is, or twice as far."""
    one, other = (towers(dtype=torch.float32) for _ in range(2))
    truth = towers(dtype=torch.float32).double()
    plain(truth, N, *(v.double() for v in batch(torch.float32)))
    plain(one, N, *batch(torch.float32))
    cached(other, 7, *batch(torch.float32))
    for exact, found, ours in zip(gradients(truth), gradients(one), gradients(other)):
        floor = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (found - exact).abs().max() + floor


@pytest.mark.parametrize("step", [cached, deferred])
def test_dropout_is_equal_in_both_passes(step):
    one, other = towers(0.5), towers(0.5)
    torch.manual_seed(7)
    wanted = plain(one, 5, *batch())
    after = torch.rand(3)
    torch.manual_seed(7)
    torch.testing.assert_close(step(other, 5, *batch()), wanted, rtol=1e-14, atol=0)
    assert torch.equal(torch.rand(3), after), "the generator goes on as after one pass"
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)


def test_a_shared_encoder_learns_of_all_its_inputs():
    one, other = towers(0.5), towers(0.5)
    views = batch()
    torch.manual_seed(7)
    ck.nt_xent(*(in_chunks(one.image, v, 9) for v in views), 3.0, normalize=True).backward()
    torch.manual_seed(7)
    ck.cached_step(other.image, views, lambda a, b: ck.nt_xent(a, b, 3.0, normalize=True), chunk_size=9)
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_encoder_is_run_once(frozen):
    one, other = towers(), towers()
    calls = dict.fromkeys(("image", "text"), 0)
    for model in (one, other):
        getattr(model, frozen).requires_grad_(False)
    plain(one, N, *batch())

    def counting(name: str) -> Callable[[Tensor], Tensor]:
        def encode(value: Tensor) -> Tensor:
            calls[name] += 1
            return getattr(other, name)(value)

        return encode

    ck.cached_step((counting("image"), counting("text")), batch(), other.loss, chunk_size=6)
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)
    assert calls[frozen] == 4
    # the last chunk of the last input goes backward from where it is
    assert calls["text" if frozen == "image" else "image"] == (7 if frozen == "image" else 8)


def test_inputs_of_different_lengths_and_chunks():
    """More documents than queries."""
    one, other = towers(), towers()
    x, _ = batch()
    _, y = batch(n=40)
    ck.info_nce(one.image(x), one.text(y), 2.0).backward()
    ck.cached_step([other.image, other.text], [x, y], lambda a, b: ck.info_nce(a, b, 2.0), chunk_size=(4, 11))
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)


Pair = namedtuple("Pair", "first, second")


@pytest.mark.parametrize("form", [dict, tuple, Pair, list])
def test_inputs_are_cut_whatever_holds_them(form):
    one, other = towers(), towers()
    x, y = batch()
    plain(one, N, x, y)
    flag, zero = "as it is", torch.tensor(0.0, dtype=torch.float64)

    def held(v: Tensor) -> Any:
        if form is dict:
            return {"value": v, "more": {"flag": flag, "zero": zero}}
        if form is Pair:
            return Pair(v, zero)
        return (v, flag) if form is tuple else list(v)

    def taken(v: Any) -> Tensor:
        if form is dict:
            assert v["more"]["flag"] is flag
            return v["value"] + v["more"]["zero"]
        if form is list:
            return torch.stack(v)
        assert type(v) is form
        return v[0]

    encoders = (lambda v: other.image(taken(v)), lambda v: other.text(taken(v)))
    ck.cached_step(encoders, (held(x), held(y)), other.loss, chunk_size=8)
    torch.testing.assert_close(gradients(other), gradients(one), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("step", [cached, deferred])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(step, cache):
    one, other = (towers(dtype=torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        wanted = plain(one, 7, *batch(torch.float32))
        found = step(other, 7, *batch(torch.float32))
    assert torch.equal(found, wanted)
    truth = towers(dtype=torch.float32)
    plain(truth, 7, *batch(torch.float32))
    for exact, theirs, ours in zip(gradients(truth), gradients(one), gradients(other)):
        assert ours is not None and ours.dtype == torch.float32
        # sums of chunks in another order, of features rounded to bfloat16 alike
        assert (ours - theirs).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3 * exact.abs().max()


def test_weights_are_cast_anew_for_the_pass_with_a_graph():
    """Older versions of torch keep weights that were cast without one, and learn nothing of them."""
    model, seen = towers(dtype=torch.float32), set()

    def encode(value: Tensor) -> Tensor:
        seen.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
        return model.image(value)

    with torch.autocast("cpu", torch.bfloat16):
        ck.cached_step(encode, batch(torch.float32), model.loss, chunk_size=7)
        assert torch.is_autocast_cache_enabled()
    assert seen == {(False, False), (True, True)}


@pytest.mark.parametrize("step", ["cached_step", "cached_loss"])
def test_grad_scaler(step):
    """Features' gradients are scaled before they are rounded to float16, and parameters' are unscaled as ever."""
    one, other = (towers(dtype=torch.float32) for _ in range(2))
    small = 1e-7  # without the scaler most of float16's gradients would be 0

    def loss(model: Towers) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: small * model.loss(x, y)

    def half(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda v: encoder(v).half()

    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e7) for model in (one, other)]
    x, y = batch(torch.float32)
    scalers[0].scale(loss(one)(half(one.image)(x), half(one.text)(y))).backward()
    encoders = (half(other.image), half(other.text))
    if step == "cached_step":
        ck.cached_step(encoders, (x, y), loss(other), chunk_size=7, scaler=scalers[1])
    else:
        scalers[1].scale(ck.cached_loss(encoders, (x, y), loss(other), chunk_size=7)).backward()
    before = copy.deepcopy(other.state_dict())
    for scaler, optimizer in zip(scalers, optimizers):
        scaler.step(optimizer)
        scaler.update()
    assert any(not torch.equal(before[name], value) for name, value in other.state_dict().items())
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-4)


def test_gradients_are_added_to_what_is_there():
    one, other = towers(), towers()
    plain(one, N, *batch())
    for _ in range(2):
        cached(other, 8, *batch())
    torch.testing.assert_close(gradients(other), [2 * g for g in gradients(one)], rtol=1e-12, atol=1e-14)


def test_a_factor_on_the_deferred_loss():
    one, other = towers(), towers()
    plain(one, N, *batch())
    value = ck.cached_loss((other.image, other.text), batch(), other.loss, chunk_size=8)
    (value / 4 + 1).backward()
    torch.testing.assert_close(gradients(other), [g / 4 for g in gradients(one)], rtol=1e-12, atol=1e-14)


def test_without_gradients_there_is_the_value():
    model = towers()
    x, y = batch()
    with torch.no_grad():
        value = ck.cached_loss((model.image, model.text), (x, y), model.loss, chunk_size=8)
        torch.testing.assert_close(value, model.loss(model.image(x), model.text(y)))
        assert not value.requires_grad
        with pytest.raises(RuntimeError, match="gradients to be enabled"):
            cached(model, 8, x, y)


def test_nothing_to_learn_is_an_error_as_in_a_plain_step():
    model = towers().requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        cached(model, 8, *batch())


def test_no_samples():
    model = towers()
    x, y = batch(n=0)
    assert cached(model, 8, x, y).item() == 0.0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_the_deferred_loss_goes_backward_once():
    model = towers()
    value = ck.cached_loss((model.image, model.text), batch(), model.loss, chunk_size=8)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        value.backward()
    value = ck.cached_loss((model.image, model.text), batch(), model.loss, chunk_size=8)
    with pytest.raises(RuntimeError, match="create_graph"):
        value.backward(create_graph=True)


def test_batch_normalisation_is_warned_of():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8)).double()
    with pytest.warns(UserWarning, match="encoders: batch normalisation") as caught:
        ck.cached_step(model, batch(), lambda a, b: ck.nt_xent(a, b, 3.0), chunk_size=8)
    assert {warning.filename for warning in caught} == {__file__}
    model.eval()
    ck.cached_step(model, batch(), lambda a, b: ck.nt_xent(a, b, 3.0), chunk_size=8)


X, Y = batch()
LINEAR = nn.Linear(D, 4).double()
CLIP = lambda a, b: ck.clip_loss(a, b, 2.0)  # noqa: E731


@pytest.mark.parametrize(
    "encoders, inputs, loss, more, error, said",
    [
        (LINEAR, X, CLIP, {}, TypeError, "inputs: expected a tuple of inputs, such as .images, texts.; got Tensor"),
        (LINEAR, (), CLIP, {}, TypeError, "inputs: expected a tuple of inputs.*got none"),
        (LINEAR, (X, 3), CLIP, {}, ValueError, r"inputs\[1\]: expected tensors or lists of one length.*got none"),
        (LINEAR, (X, (Y, Y[:3])), CLIP, {}, ValueError, r"inputs\[1\]: .*got lengths \[3, 23\]"),
        ((LINEAR,), (X, Y), CLIP, {}, TypeError, "encoders: expected one, or one for each of 2 inputs; got 1"),
        (3, (X, Y), CLIP, {}, TypeError, "encoders: expected one, or one for each of 2 inputs; got int"),
        ((LINEAR, 3), (X, Y), CLIP, {}, TypeError, "encoders: expected functions or modules; got int"),
        (LINEAR, (X, Y), 3, {}, TypeError, "loss: expected a function of the features; got int"),
        (LINEAR, (X, Y), lambda a, b: a, {}, TypeError, r"loss: .*got shape \[23, 4\]"),
        (LINEAR, (X, Y), lambda a, b: {}, {}, TypeError, "loss: .*got dict"),
        (LINEAR, (X, Y), CLIP, {"chunk_size": 0}, ValueError, "chunk_size: expected at least 1; got 0"),
        (LINEAR, (X, Y), CLIP, {"chunk_size": 2.0}, TypeError, "chunk_size: expected an int; got float"),
        (LINEAR, (X, Y), CLIP, {"chunk_size": (2, 3, 4)}, TypeError, "chunk_size: expected one, or one.*got 3"),
        (LINEAR, (X, Y), CLIP, {"no_sync": 3}, TypeError, "no_sync: expected a function.*got int"),
        (
            lambda v: (v, v), (X, Y), CLIP, {}, TypeError,
            "encoders: expected it to return one tensor; got tuple of length 2; give each output an encoder",
        ),
        ((LINEAR, lambda v: {}), (X, Y), CLIP, {}, TypeError, r"encoders\[1\]: .* one tensor; got dict"),
        (lambda v: torch.cat([v, v]), (X, Y), CLIP, {}, ValueError, r"for each of 8 samples; got shape \[16, 6\]"),
        (lambda v: v.sum(), (X, Y), CLIP, {}, ValueError, r"for each of 8 samples; got shape \[\]"),
    ],
)  # fmt: skip
def test_refusals_in_words(encoders, inputs, loss, more, error, said):
    for function in (ck.cached_step, ck.cached_loss):
        with pytest.raises(error, match=said):
            function(encoders, inputs, loss, **{"chunk_size": 8, **more})
