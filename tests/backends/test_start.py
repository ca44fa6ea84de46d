"""How kernels start: directly where Triton is known to allow it, else Triton's own way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from contrastive_kernels._triton import start


class Kernel:
    """Counts how it is started; what it compiles to has the members given."""

    arg_names = ("x_ptr", "n", "BLOCK")

    def __init__(self, **members):
        self.starts = {"by Triton": 0, "directly": 0}
        self.members = members

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.starts["by Triton"] += 1
            return SimpleNamespace(**self.members)

        return run

    @classmethod
    def usual(cls):
        """One as of Triton 3.4 to 3.9."""
        kernel = cls(function=1, packed_metadata=())

        def run(*arguments):
            assert arguments == (7, 1, 1, 5, 1, (), None, None, None, 1, 3, 16)
            kernel.starts["directly"] += 1

        kernel.members["run"] = run
        return kernel


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """A device, a stream on it, and nothing that was compiled before."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 5)
    monkeypatch.setattr(start, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(start, "_compiled", {})


def twice(kernel):
    """Starts a kernel two times."""
    for _ in range(2):
        start.start(kernel, 7, start.Arguments(1, 3), {"BLOCK": 16})
    return kernel.starts


def test_the_second_start_is_direct():
    assert start.may_start_directly()
    assert twice(Kernel.usual()) == {"by Triton": 1, "directly": 1}


@pytest.mark.parametrize("version", [(3, 3), (3, 10), (4, 0)], ids=str)
def test_not_with_a_version_that_nobody_tried(version, monkeypatch):
    monkeypatch.setattr(start, "TRITON_VERSION", version)
    assert twice(Kernel.usual()) == {"by Triton": 2, "directly": 0}


def test_not_without_knobs(monkeypatch):
    monkeypatch.setattr(start, "knobs", None)
    assert twice(Kernel.usual()) == {"by Triton": 2, "directly": 0}


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [lambda metadata: None, SimpleNamespace(calls=[print])], ids=["function", "chain"])
def test_not_where_a_profiler_listens(hook, name, monkeypatch):
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    setattr(runtime, name, hook)
    monkeypatch.setattr(start, "knobs", SimpleNamespace(runtime=runtime))
    assert twice(Kernel.usual()) == {"by Triton": 2, "directly": 0}
    setattr(runtime, name, None)
    assert twice(Kernel.usual()) == {"by Triton": 1, "directly": 1}


@pytest.mark.parametrize("missing", ["run", "function", "packed_metadata"])
def test_not_with_a_kernel_of_another_kind(missing):
    kernel = Kernel.usual()
    del kernel.members[missing]
    assert twice(kernel) == {"by Triton": 2, "directly": 0}


def test_each_device_has_its_own(monkeypatch):
    kernel = Kernel.usual()
    assert twice(kernel) == {"by Triton": 1, "directly": 1}
    monkeypatch.setattr(start.driver.active, "get_current_device", lambda: 1)
    assert twice(kernel) == {"by Triton": 2, "directly": 2}


@pytest.mark.parametrize("size", [0, 64], ids=["usual", "scratch of its own"])
def test_what_the_launcher_calls(size):
    """Triton's own launcher, but for the C function that it compiles, hears the same either way."""
    from triton.backends.nvidia.driver import CudaLauncher

    heard = []
    launcher = CudaLauncher.__new__(CudaLauncher)
    launcher.global_scratch_size, launcher.profile_scratch_size = size, 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.launch_cooperative_grid, launcher.launch_pdl = False, True
    launcher.launch = lambda *arguments: heard.append(arguments)
    run, more = start.starter(launcher)
    if start.TRITON_VERSION != (3, 6) or size:
        assert run is launcher and more == ()
        return
    launcher(7, 1, 1, 5, 1, (4, 1), None, None, None, 64, 3)
    run(7, 1, 1, 5, 1, *more, (4, 1), None, None, None, 64, 3)
    assert len(heard) == 2 and heard[0] == heard[1]
