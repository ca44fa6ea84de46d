"""Matrix products of bfloat16 operands on the CPU: exact, and without a trace in the process's settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest
import torch

from contrastive_kernels.backends import products
from contrastive_kernels.backends.products import _AmxProducts, default_weights_dtype, score_product
from contrastive_kernels.panels.panel import Panel

EPS = torch.finfo(torch.float32).eps
has_switch = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no setting of the products"
)


def setting() -> str:
    """Of float32 products, as the process has it."""
    return torch.backends.mkldnn.matmul.fp32_precision


def bfloat16_panel(rows: int = 8, cols: int = 5, d: int = 16) -> Panel:
    g = torch.Generator().manual_seed(d)
    x, y = (torch.randn(n, d, generator=g).bfloat16().float() for n in (rows, cols))
    scores = torch.empty(rows, cols)
    return Panel(x, y, scores, scores, torch.tensor([1.0, 0.0, 0.0]), bfloat16_values=True)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch as on a machine with AMX; where there is none, torch multiplies as it always does."""
    monkeypatch.setattr(_AmxProducts, "available", True)
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings that products have seen; products are Python functions here, as under a mode of torch's."""
    seen, mm = [], torch.mm

    def seeing(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(setting())
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", seeing)
    return seen


@has_switch
def test_the_precision_of_other_products_is_left_as_it_was(amx, within):
    """A setting that is inherited stays inherited: the loss within `flags` must not outlast them."""
    mkldnn = torch.backends.mkldnn

    def run() -> None:
        score_product(bfloat16_panel())
        assert within.pop() == "bf16"

    assert setting() == "none"
    run()
    assert setting() == "none"
    before = mkldnn.fp32_precision
    try:
        mkldnn.fp32_precision = "bf16"
        run()
        assert setting() == "bf16"
        mkldnn.fp32_precision = "ieee"
        assert setting() == "ieee", "no longer inherited"
        mkldnn.matmul.fp32_precision = "bf16"
        run()
        assert setting() == "bf16"
    finally:
        mkldnn.fp32_precision, mkldnn.matmul.fp32_precision = before, "none"


@has_switch
def test_the_last_thread_out_restores(amx, monkeypatch):
    mm, both, first_is_out, seen = torch.mm, threading.Barrier(2), threading.Event(), []

    def meeting(*args: Any, **options: Any) -> torch.Tensor:
        both.wait(60)
        if threading.current_thread() is second:
            first_is_out.wait(60)
            seen.append(setting())
        return mm(*args, **options)

    second = threading.Thread(target=score_product, args=(bfloat16_panel(),))
    monkeypatch.setattr(torch, "mm", meeting)
    second.start()
    score_product(bfloat16_panel())
    first_is_out.set()
    second.join(60)
    assert seen == ["bf16"], "the first thread out took the switch from the other one"
    assert setting() == "none"


class Stop(BaseException):
    """What stands for KeyboardInterrupt here: one that came too late would fail its test, and not end the whole run."""


class Interrupt:
    """Ctrl-C at the n-th bytecode within products.py, by a trace function."""

    def __init__(self, at: int) -> None:
        self.left, self.fired = at, False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != products.__file__:
            return None
        frame.f_trace_opcodes = True
        if event in ("opcode", "line", "call"):
            if self.left == 0:
                self.fired = True
                sys.settrace(None)
                raise Stop
            self.left -= 1
        return self


def interrupted_everywhere(after: Any = None) -> int:
    """Interrupts a product at each of its bytecodes in turn; how many there are."""
    at = 0
    before, traced = setting(), sys.gettrace()
    while True:
        interrupt, panel = Interrupt(at), bfloat16_panel()
        try:
            sys.settrace(interrupt)
            score_product(panel)
        except Stop:
            pass
        finally:
            sys.settrace(traced)
        if after is not None:
            after(at)
        assert setting() == before, f"interrupted at bytecode {at}"
        if not interrupt.fired:
            return at
        at += 1


@has_switch
@pytest.mark.parametrize("own", ["none", "ieee", "bf16"])
def test_an_interrupt_at_any_bytecode_leaves_the_setting(amx, own):
    torch.backends.mkldnn.matmul.fp32_precision = own
    assert interrupted_everywhere() > 100
    assert _amx_is_idle()


@has_switch
def test_an_interrupt_beside_another_threads_product_leaves_the_setting(amx, monkeypatch):
    """The other thread is within its product all the while, and restores in the end."""
    mm, inside, done = torch.mm, threading.Event(), threading.Event()

    def waiting(*args: Any, **options: Any) -> torch.Tensor:
        if threading.current_thread() is other:
            inside.set()
            done.wait(600)
        return mm(*args, **options)

    monkeypatch.setattr(torch, "mm", waiting)
    other = threading.Thread(target=score_product, args=(bfloat16_panel(),))
    other.start()
    assert inside.wait(60)
    try:
        assert setting() == "bf16"
        assert interrupted_everywhere() > 100
    finally:
        done.set()
        other.join(60)
    assert setting() == "none"
    assert _amx_is_idle()


@has_switch
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_product_that_fails_leaves_the_setting(amx, monkeypatch, error):
    def failing(*args: Any, **options: Any) -> torch.Tensor:
        assert setting() == "bf16"
        raise error

    monkeypatch.setattr(torch, "mm", failing)
    with pytest.raises(error):
        score_product(bfloat16_panel())
    assert setting() == "none"
    assert _amx_is_idle()


@has_switch
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
def test_signals_leave_the_setting():
    """The real thing: a signal's handler raises, at whatever bytecode the timer finds.

    In a process of its own, so that no alarm can reach another test.
    """
    command = [sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, "1000 alarms\n"), result.stdout + result.stderr


def raise_alarms(alarms: int) -> None:
    """Products that are interrupted by a timer, each later than the one before."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Stop

    _AmxProducts.available = True
    panel = bfloat16_panel()
    signal.signal(signal.SIGALRM, handler)
    for i in range(alarms):
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + i % 40))
            score_product(panel)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # the alarm is on its way
                pass
            raise AssertionError("an alarm was swallowed")
        except Stop:
            pass
        assert setting() == "none", f"alarm {i}"
    assert _amx_is_idle()
    print(f"{alarms} alarms")


def _amx_is_idle() -> bool:
    return not products._amx_products._running


def test_bfloat16_products_are_exact(set_threads):
    """Products of bfloat16 values, summed in float32: nothing is rounded to bfloat16, whichever unit multiplies."""
    set_threads(2)
    for rows, cols, d in ((300, 500, 64), (65, 70, 1000), (1, 257, 7)):
        g = torch.Generator().manual_seed(d)
        x, y = (torch.randn(n, d, generator=g).bfloat16().float() for n in (rows, cols))
        scores = torch.empty(rows, cols)
        score_product(Panel(x, y, scores, scores, torch.tensor([1.0, 0.0, 0.0]), bfloat16_values=True))
        exact = x.double() @ y.double().T
        size = x.double().abs() @ y.double().abs().T
        assert ((scores.double() - exact).abs() <= 4 * EPS * size).all()


def test_without_onednn_bfloat16_weights_stay_in_float32(monkeypatch):
    """Builds without it (some for ARM) have none of its operators to ask."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert default_weights_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32


if __name__ == "__main__":
    raise_alarms(1000)
