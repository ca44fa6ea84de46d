"""The product in bfloat16 with float32 sums that the extension has for CPUs with AVX512_BF16."""

import itertools

import pytest
import torch
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import reference
from contrastive_kernels.backends import Entries, cpu
from contrastive_kernels.backends.native import MISSING
from contrastive_kernels.backends.registry import ORDER

pytestmark = pytest.mark.skipif(
    MISSING is not None or not cpu._C.multiplies_bfloat16(), reason="no extension, or a CPU without AVX512_BF16"
)
CPU = next(backend for backend in ORDER if backend.name == "cpu")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
#: Rows, depth, columns: one, those of the kernel's blocks, past them, and depths and columns past a packed block; last
#: so many rows that, turned, their depths lie far apart.
SIZES = [
    (1, 1, 1),
    (14, 2, 32),
    (15, 3, 33),
    (13, 31, 47),
    (28, 1024, 64),
    (29, 1027, 515),
    (3, 2050, 40),
    (130, 64, 5),
    (1075, 9, 33),
]


def drawn(rows: int, cols: int, dtype: torch.dtype, turned: bool, gap: int = 0) -> Tensor:
    """[rows, cols] between -1 and 1, perhaps by columns, in lines with a gap of NaN behind."""
    lines, length = (cols, rows) if turned else (rows, cols)
    whole = torch.full((lines, length + gap), torch.nan, dtype=dtype)
    whole[:, :length] = 2 * torch.rand(lines, length) - 1
    return whole[:, :length].T if turned else whole[:, :length]


def assert_product(x: Tensor, y: Tensor, out: Tensor, before: Tensor | float = 0.0) -> None:
    """Within roundings to float32 of partial sums at random."""
    x, y = (v.to(BFLOAT16).double() for v in (x, y))
    bound = x.shape[1] ** 0.5 * torch.finfo(FLOAT32).eps * (x.abs() @ y.abs() + 2)
    assert ((out.double() - (x @ y + before)).abs() <= bound).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_operands_of_every_layout(size, threads, set_threads):
    set_threads(threads)
    rows, depth, cols = size
    kinds = list(itertools.product((BFLOAT16, FLOAT32), (False, True), (0, 3)))
    for (xd, xt, xg), (yd, yt, yg) in itertools.product(kinds, kinds[::-1]):
        x, y = drawn(rows, depth, xd, xt, xg), drawn(depth, cols, yd, yt, yg)
        out = torch.full((rows, cols + 7), torch.nan, dtype=FLOAT32)
        CPU.multiply(x, y, out[:, :cols])
        assert_product(x, y, out[:, :cols])
        assert out[:, cols:].isnan().all()


def test_values_in_float32_are_rounded_to_even():
    x = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20)]])
    found = torch.empty(1, 3)
    CPU.multiply(x.T.contiguous().reshape(3, 1)[:, :1], torch.ones(1, 1), found.T)
    assert found.tolist() == x.to(BFLOAT16).float().tolist()


@pytest.mark.parametrize("depth", [7, 1500])
def test_it_adds(depth):
    x, y, before = drawn(20, depth, BFLOAT16, False), drawn(depth, 50, BFLOAT16, True), torch.randn(20, 50)
    out = before.clone()
    CPU.multiply(x, y, out, add=True)
    assert_product(x, y, out, before.double())


def test_a_sum_does_not_depend_on_where_it_lies():
    x, y = drawn(1, 1030, BFLOAT16, False).repeat(33, 1), drawn(1, 1030, BFLOAT16, False).repeat(1050, 1)
    out = torch.ones(33, 1050)
    CPU.multiply(x, y.T, out, add=True)
    assert (out == out[0, 0]).all()


@pytest.mark.parametrize("with_entries", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (70, 1100, 520)], ids=str)
def test_a_result_in_bfloat16_is_the_rounded_one(size, with_entries):
    rows, depth, cols = size
    x, y = drawn(rows, depth, FLOAT32, True), drawn(depth, cols, BFLOAT16, False)
    entries = Entries(torch.randn(rows), torch.randint(0, depth, (rows,))) if with_entries else None
    out, rounded = torch.empty(rows, cols), torch.full((rows, cols + 3), torch.nan, dtype=BFLOAT16)
    CPU.multiply(x, y, out, entries=entries)
    CPU.multiply(x, y, rounded[:, :cols], entries=entries)
    assert torch.equal(rounded[:, :cols], out.to(BFLOAT16))
    assert rounded[:, cols:].isnan().all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("how", ["index", "offset", "negative offset"])
@pytest.mark.parametrize("size", [(1, 1, 1), (70, 40, 33), (15, 1100, 20), (20, 9, 600)], ids=str)
def test_entries(size, how, turned):
    """They are not rounded, and those that lie outside do not count."""
    rows, depth, cols = size
    x, y = drawn(rows, depth, FLOAT32, turned), drawn(depth, cols, BFLOAT16, False, gap=1)
    count, last = (depth, rows) if turned else (rows, depth)
    values, index = 1e3 * torch.randn(count), None
    offset = {"offset": 2, "negative offset": -1}.get(how, 0)
    places = torch.arange(count) + offset
    if how == "index":
        index = places = torch.randint(-1, last + 1, (count,))
    inside = (places >= 0) & (places < last)
    entries, lines = places[inside], inside.nonzero()[:, 0]
    dense = torch.zeros(rows, depth, dtype=torch.float64)
    dense[(entries, lines) if turned else (lines, entries)] = values[inside].double()
    out = torch.randn(rows, cols)
    want = out.double() + (x.to(BFLOAT16).double() + dense) @ y.double()
    CPU.multiply(x, y, out, True, Entries(values, index, offset, turned))
    size_of = (x.abs().double() + dense.abs()) @ y.abs().double() + 4
    assert ((out - want).abs() <= depth**0.5 * torch.finfo(FLOAT32).eps * size_of).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [(203, 1030, 97), (30, 300, 1100), (1100, 40, 70)], ids=str)
def test_a_result_does_not_depend_on_threads(size, dtype, set_threads):
    """Nor on the grid of parts that they do: of rows alone, of columns too, and of ragged ones."""
    rows, depth, cols = size
    x, y = drawn(rows, depth, FLOAT32, False), drawn(depth, cols, BFLOAT16, False)
    entries = Entries(torch.randn(depth), torch.randint(-1, rows, (depth,)), turned=True)
    found = []
    for threads in (1, 2, 3, 5, 16):
        set_threads(threads)
        found.append(torch.full((rows, cols), torch.nan, dtype=dtype))
        CPU.multiply(x, y, found[-1], entries=entries)
    assert not found[0].isnan().any()
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("rows, depth, cols", [(0, 5, 6), (5, 0, 6), (5, 6, 0)])
def test_nothing(rows, depth, cols):
    out = torch.ones(rows, cols)
    CPU.multiply(torch.ones(rows, depth), torch.ones(depth, cols), out, add=True)
    assert (out == 1).all()
    for dtype in (FLOAT32, BFLOAT16):
        out = torch.ones(rows, cols, dtype=dtype)
        CPU.multiply(torch.ones(rows, depth), torch.ones(depth, cols), out)
        assert (out == depth).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(value):
    x, y = drawn(17, 35, BFLOAT16, False), drawn(35, 37, BFLOAT16, False)
    x[15, 34], y[3, 36] = value, value
    out = torch.empty(17, 37)
    CPU.multiply(x, y, out)
    finite = torch.ones(17, 37, dtype=torch.bool)
    finite[15], finite[:, 36] = False, False
    assert torch.equal(out.isfinite(), finite)


def test_two_lines_with_gaps_in_both_directions():
    x, y = torch.randn(6, 9, 2)[:, :, 0], torch.randn(9, 8, 2)[..., 1]
    out = torch.empty(6, 8)
    CPU.multiply(x, y, out)
    bound = 40 * torch.finfo(BFLOAT16).eps
    assert (out - x @ y).abs().max() < bound


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: 0}, "operands must not be null"),
        ({1: 2}, "float32 or bfloat16"),
        ({2: 3}, "neighbours"),
        ({8: 0}, "out must not be null"),
        ({9: 2}, "out is float32, or bfloat16"),
        ({9: 1, 14: True}, "unless it is added to"),
        ({13: 1}, "sizes are ordered"),
        ({19: 0}, "threads at least 1"),
        ({15: 1}, "y must be bfloat16 with line_stride 1"),
    ],
)
def test_wrong_calls_raise(change, message):
    x, out = torch.ones(2, 2), torch.empty(2, 2)
    given = [x.data_ptr(), 0, 2, 1, x.data_ptr(), 0, 1, 2, out.data_ptr(), 0, 2, 2, 2, 2, False, 0, 0, 0, False, 1]
    if 2 in change:
        given[3] = 3
    for place, value in change.items():
        given[place] = value
    with pytest.raises(ValueError, match=message):
        cpu._C.multiply_bfloat16(*given)


@pytest.mark.parametrize("n, workspace", [(310, None), (300, 2**18)], ids=["whole", "panels"])
def test_losses_take_it(n, workspace, monkeypatch):
    """Scores and both gradients; none of it on machines where the pass is not AVX-512's."""
    calls = []
    multiply = cpu._multiply
    monkeypatch.setattr(cpu, "_multiply", lambda *given: calls.append(given[:2]) or multiply(*given))
    x, y = (torch.nn.functional.normalize(torch.randn(n, 24), dim=1).to(BFLOAT16).requires_grad_() for _ in range(2))

    def step() -> list[Tensor]:
        calls.clear()
        value = ck.clip_loss(x, y, 10.0, workspace_bytes=workspace, backend="cpu")
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    found = step()
    assert len(calls) == 3 if workspace is None else len(calls) > 6
    cpu._C.set_instruction_set("avx2")
    try:
        others = step()
        assert not calls
    finally:
        cpu._C.set_instruction_set("auto")
    torch.testing.assert_close(found[0], others[0], rtol=1e-6, atol=0.0)
    for mine, other in zip(found[1:], others[1:]):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-2 * other.abs().max().item())


@pytest.mark.parametrize("rows, workspace", [(70, None), (140, None), (140, 2**18), (1100, None)])
@pytest.mark.parametrize("loss", ["clip_loss", "info_nce", "nt_xent"])
def test_what_features_have_in_common_stays_out_of_gradients(loss, rows, workspace):
    """Weights of a row sum to 0; rounded with the positive's among them they would not."""
    common = torch.randn(128)
    near = (torch.nn.functional.normalize(common + 0.1 * torch.randn(rows, 128), dim=1) for _ in range(2))
    leaves = [v.to(BFLOAT16).requires_grad_() for v in near]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    value = getattr(ck, loss)(*leaves, 14.0, backend="cpu", workspace_bytes=workspace or 2**26)
    want = getattr(reference, loss)(*exact, 14.0)
    for mine, right in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(want, exact)):
        assert (mine.double() - right).norm() <= torch.finfo(BFLOAT16).eps * right.norm()


@pytest.mark.parametrize("rows, cols", [(70, 90), (2500, 3000)], ids=["whole", "bands"])
def test_gradients_of_biases(rows, cols):
    """Weights are dL/dz then, and scaled afterwards, those of the positives too."""
    common = torch.randn(64)
    near = (torch.nn.functional.normalize(common + torch.randn(k, 64), dim=1) for k in (rows, cols))
    leaves = [*(v.to(BFLOAT16).requires_grad_() for v in near), torch.randn(cols).requires_grad_()]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    index = torch.randint(0, cols, (rows,))
    value = ck.info_nce(*leaves[:2], 14.0, positives=index, candidate_bias=leaves[2], backend="cpu")
    want = reference.info_nce(*exact[:2], 14.0, positives=index, candidate_bias=exact[2])
    for mine, right in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(want, exact)):
        unit = torch.finfo(mine.dtype).eps * (1 if mine.dtype is BFLOAT16 else 14)  # logits, of this size, are rounded
        assert (mine.double() - right).norm() <= unit * right.norm()


def test_one_number_in_lines_of_any_stride():
    b = torch.randn(4, 6).to(BFLOAT16)
    x, y = b[::2][:1, ::2][:, :1], b[1::2][:1, ::2][:, :1]
    assert x.stride() == (12, 2)
    assert ck.info_nce(x, y, 1.0) == 0
    out = torch.empty(1, 1)
    CPU.multiply(x, y, out)
    assert out.item() == x.item() * y.item()
