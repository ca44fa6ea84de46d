"""Plans of matrices that are one panel: who gets one, what compiles, and that a step starts what the whole says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from test_triton import AbsentGPU, absent_gpu, started  # noqa: F401 (fixtures)
from thorough import THOROUGH
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_kernels._triton import sequence
from contrastive_kernels._triton.whole_launch import Form, WholeRatio, WholeSigmoid, WholeSoftmax

CPU = torch.device("cpu")


def form(rows=200, cols=200, features=64, dtype=torch.bfloat16, **changes):
    """One of clip_loss, unless it is changed."""
    usual = {
        "dtypes": (torch.float32, None), "extras": (False,), "share": 0.5, "offset": 0, "symmetric": False,
        "both": True, "wants": (True, True, True, False),
    }  # fmt: skip
    return Form(rows, cols, features, dtype, CPU, **(usual | changes))


def step(whole):
    """Value and gradients of tensors of the whole's form."""
    f = whole.form
    x, y = (torch.zeros(n, f.features, dtype=f.dtype) for n in (f.rows, f.cols))
    scale, bias = (1.0 if dtype is None else torch.ones((), dtype=dtype) for dtype in f.dtypes)
    extras = [torch.ones(f.rows) if there else None for there in f.extras]
    value, *kept = whole.forward(x, y, scale, bias, extras)
    return value, whole.backward(x, y, scale, bias, kept, torch.ones(()))


_X_AND_Y, _ALL = (True, True, False, False), (True,) * 4
_RESTS = {"two": (True, True, False, False, False, False), "one": (True, False, True, False, False, False)}
FORMS = {
    "clip": lambda: WholeSoftmax(form()),
    "many rows": lambda: WholeSoftmax(form(3000, 3000, 100)),
    "weighted": lambda: WholeSoftmax(form(extras=(True,), wants=(True, False, False, False))),
    "info_nce": lambda: WholeSoftmax(form(cols=300, offset=7, both=False, dtypes=(None, None), wants=_X_AND_Y)),
    "nt_xent": lambda: WholeSoftmax(form(offset=100, both=False, symmetric=True, wants=(True, False, True, False))),
    "scale alone": lambda: WholeSoftmax(form(dtype=torch.float32, wants=(False, False, True, False))),
    "sigmoid": lambda: WholeSigmoid(form(both=False, dtypes=(torch.bfloat16, torch.float64), wants=_ALL)),
    "bias alone": lambda: WholeSigmoid(
        form(both=False, extras=(True,), dtypes=(None, torch.float32), wants=(False, False, False, True))
    ),
    "decomposable": lambda: WholeRatio(form(extras=_RESTS["two"], rule=(1.0, 0.0, 1.0))),
    "one direction": lambda: WholeRatio(form(cols=250, both=False, extras=_RESTS["one"], rule=(0.0, -0.7, 1.5))),
}


if THOROUGH:  # their kernels are those of large panels, which are compiled elsewhere
    FORMS["large"] = lambda: WholeSoftmax(form(4224, 4224))
    FORMS["large sigmoid"] = lambda: WholeSigmoid(
        form(4224, 4224, both=False, dtypes=(torch.float32, torch.float32), wants=_ALL)
    )


@pytest.mark.parametrize("name", FORMS)
def test_kernels_compile(name, started):  # noqa: F811
    """For an H100, from the arguments of a step: with and without what may be missing."""
    whole = FORMS[name]()
    value, gradients = step(whole)
    assert value.shape == () and value.dtype == torch.float32
    assert [g is not None for g in gradients] == list(whole.form.wants)
    expected = [each.kernel.fn.__name__ for each in (*whole.launches.launches, *whole.finish.launches)]
    assert [kernel.name for kernel in started] == expected


class Recorded(AbsentGPU):
    """Notes what starts, and on which stream."""

    starts: list = []  # noqa: RUF012 (cleared by whoever reads it)
    stream = 1

    class launcher_cls:
        def __init__(self, source, metadata):
            self.name = source.fn.__name__

        def __call__(self, *arguments):
            Recorded.starts.append((self.name, arguments))

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return 1, 1, 0, 0, 1024

        @staticmethod
        def unload_module(module):
            pass

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return Recorded.stream


@pytest.fixture
def recorded(monkeypatch, absent_gpu):  # noqa: F811
    monkeypatch.setattr(triton.runtime.driver, "_active", Recorded())
    monkeypatch.setattr(Recorded, "stream", 1)
    Recorded.starts.clear()
    return Recorded.starts


def test_direct_starts_have_the_arguments_of_tritons_own(recorded):
    """Addresses where Triton has tensors; on the stream that is current, with memory that is the call's own."""
    whole = WholeSigmoid(form(both=False, extras=(True,), dtypes=(torch.float32, None), wants=(True,) * 3 + (False,)))
    f = whole.form
    x, y = (torch.zeros(f.rows, f.features, dtype=f.dtype) for _ in range(2))
    values = [x, y, torch.zeros(()), torch.zeros(whole.room.bytes, dtype=torch.uint8)]
    values += [torch.zeros(f.rows, f.cols, dtype=f.dtype), torch.ones(()), -10.0, torch.ones(f.rows)]
    whole.launches(values)
    by_triton = list(recorded)
    recorded.clear()
    Recorded.stream = 2
    whole.launches(values)
    assert [name for name, _ in recorded] == [name for name, _ in by_triton] and len(recorded) == 5
    for launch, (_, first), (_, second) in zip(whole.launches.launches, by_triton, recorded):
        assert first[:3] == second[:3] and (first[3], second[3]) == (1, 2)
        for place, a, b in zip(launch.places, first[9:], second[9:]):
            if place != sequence.number(None):  # which the compiled kernel does not have
                assert (a.data_ptr() if isinstance(a, torch.Tensor) else a) == b
    recorded.clear()
    values[3] = torch.zeros(whole.room.bytes, dtype=torch.uint8)
    whole.launches(values)
    assert any(values[3].data_ptr() == argument for argument in recorded[0][1][9:] + recorded[3][1][9:])


def test_large_matrices_have_persistent_programs(absent_gpu):  # noqa: F811
    """From 4,096 x 4,096 on, where the TMA unit can copy; its descriptors are those of Triton's own way of starting."""
    names = ["refer_kernel", "persistent_kernel", "rest_kernel"]
    whole = WholeSoftmax(form(4160, 4160))
    kernels = [each.kernel.fn.__name__ for each in whole.launches.launches]
    assert kernels == ["dots_kernel", *names[1:], "softmax_kernel", *names, "totals_kernel"]
    for small in (form(4032, 4032), form(4160, 4160, 60), form(4160, 4160, 64, torch.float32)):
        assert "persistent_kernel" not in [each.kernel.fn.__name__ for each in WholeSoftmax(small).launches.launches]
    x, weights = torch.zeros(4160, 64, dtype=torch.bfloat16), torch.zeros(4160, 4160, dtype=torch.bfloat16)
    values = [x, x + 1, torch.zeros(()), torch.zeros(whole.room.bytes, dtype=torch.uint8), weights, torch.ones(()), 0.0]
    bases = [0, *(v if isinstance(v, float) else v.data_ptr() for v in values)]
    found = []
    for each in whole.launches.launches:
        each.direct = (lambda *_: None, "function", "metadata")
    for each, (_, arguments) in zip(whole.launches.launches, whole.launches.ready(1, bases)):
        for place, ready in zip(each.places, arguments[9:]):
            if isinstance(ready, TensorDescriptor):
                wanted = place.value(values)
                found.append(ready.block_shape)
                assert (ready.base.data_ptr(), ready.base.dtype) == (wanted.base.data_ptr(), torch.bfloat16)
                width = 4160 if wanted.base.data_ptr() == weights.data_ptr() else 64
                assert ready.shape == wanted.shape == [4160, width] and ready.strides == wanted.strides == [width, 1]
                assert ready.block_shape == wanted.block_shape
    assert found == [[128, 64], [128, 64]] * 2 + [[128, 64]]


def test_addresses_are_forgotten(recorded):
    whole = WholeSoftmax(form(64, 64, 16))
    for _ in range(3 * sequence._REMEMBERED):
        kept = [step(whole)]
    assert len(whole.launches._ready) <= sequence._REMEMBERED and kept


def test_not_directly_where_a_profiler_listens(recorded, monkeypatch):
    whole = WholeSoftmax(form(64, 64, 16))
    step(whole)
    monkeypatch.setattr(sequence, "may_start_directly", lambda: False)
    monkeypatch.setattr(sequence.launch, "_launch", lambda *a, **k: by_triton.append(a[0]))
    by_triton = []
    step(whole)
    assert len(by_triton) == 8
