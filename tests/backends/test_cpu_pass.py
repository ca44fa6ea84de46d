"""What is the CPU's own in the C++ pass: its instruction sets, its exponential, its threads.

The panels themselves are in test_panel_pass.py.
"""

from __future__ import annotations

import pytest
import torch
from panels import CASES, instruction_sets, make_panel, start_states

from contrastive_kernels import backends
from contrastive_kernels.panels.panel import Side
from contrastive_kernels.panels.terms import EXPONENTIAL

_C = pytest.importorskip("contrastive_kernels._C", reason="the extension is not built")


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="avx512, avx2 or baseline"):
        _C.set_instruction_set("sse9")
    assert _C.instruction_set() in instruction_sets()


# ---- the exponential ----


def exponential(x):
    out = torch.empty_like(x)
    _C.exp_array(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def test_the_exponentials_error_is_the_stated_one(instruction_set):
    """1.5 units in the last place wherever the result is a normal number: every 61st float of the range."""
    one, low, high = (torch.tensor([v]).view(torch.int32).item() for v in (2.0**-30, 87.33, 88.37))
    bits = [torch.arange(one, low, 61, dtype=torch.int32) | (-(2**31)), torch.arange(one, high, 61, dtype=torch.int32)]
    x = torch.cat(bits).view(torch.float32)
    assert len(x) > 4_000_000 and x.min() < -87 and x.max() > 88
    exact = x.double().exp()
    spacing = 2.0 ** (torch.frexp(exact).exponent - 24).double()
    error = ((exponential(x).double() - exact) / spacing).abs()
    assert error.max() <= 1.5, x[error.argmax()].item()


def test_the_exponential_of_special_values(instruction_set):
    inf, nan = torch.inf, torch.nan
    for n in (1, 15, 16, 17, 40):  # alone, and in the middle of full and partial registers
        for position in {0, n // 2, n - 1}:
            for value in (0.0, -0.0, 1e-38, -1e-45, nan, inf, -inf, 1e38, -1e38, -88.5, -200.0, 89.0):
                x = torch.ones(n)
                x[position] = value
                out = exponential(x)
                others = torch.cat([out[:position], out[position + 1 :]])
                assert ((others - torch.e).abs() < 4e-7).all()
                e = out[position].item()
                if value != value:
                    assert e != e, "NaN stays NaN"
                elif abs(value) < 1e-30:
                    assert e == 1.0
                elif value < -88:
                    assert e == 0.0, "no subnormal numbers"
                else:
                    assert e >= 2e38, "the largest results, or infinity"


# ---- threads ----


def run_everything(case, threads, set_threads):
    set_threads(threads)
    neutral, _ = start_states(case)
    sides = [
        Side(state.clone(), normalizer, gain) if used else Side()
        for state, normalizer, gain, used in zip(neutral, case.normalizers, case.gains, case.use)
    ]
    reduced = [Side(None if side.state is None else side.state.clone()) for side in sides]
    cpu, arguments = backends.get("cpu"), (case.params, case.pairs)
    weights, dparams = torch.empty_like(case.scores), torch.zeros(2, dtype=torch.float64)
    cpu.reduce_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, row=reduced[0], col=reduced[1]))
    cpu.weight_panel(EXPONENTIAL, make_panel(case.scores.clone(), *arguments, weights, *sides, dparams))
    return [weights, dparams] + [side.state for side in (*sides, *reduced) if side.state is not None]


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_does_not_show(instruction_set, name, set_threads):
    """Bitwise: stripes do not depend on it, and partial sums are merged in their order."""
    case = CASES[name]()
    one = run_everything(case, 1, set_threads)
    for threads in (2, 5):
        for a, b in zip(run_everything(case, threads, set_threads), one):
            assert torch.equal(a, b)
