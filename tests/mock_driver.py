"""A GPU that is not there: kernels are compiled for it and never run, launches are counted, the host's time is real.

    python tests/mock_driver.py [--n N] [--d D] [--json] [LOSS ...]     launches and host time of a step of each loss

Launches are counted on torch's meta device, whose tensors have shapes and no memory: the package takes the ways that
it takes on a GPU. The host's time is that of small tensors on the CPU, where torch's operations take little more than
their dispatch (on the meta device they are written in Python). A kernel of ours ends where the driver would start it:
the few microseconds that each launch takes in the driver are not in the host's time. Beside it stands that of the dense
formula of two cross entropies, measured in turn, for machines differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import contrastive_kernels as ck
from contrastive_kernels._triton import launch, whole_launch
from contrastive_kernels.arguments import checks
from contrastive_kernels.backends import triton as backend
from contrastive_kernels.engine import workspace
from contrastive_kernels.operators import shared

__all__ = ["DEVICE", "Launches", "absent_gpu", "count", "dense_step", "host_seconds", "step_of"]

DEVICE = torch.device("meta")

_NUMBER = torch.zeros(1, 1, dtype=torch.float32)

#: What torch's operations of these names start no kernel for: views, and tensors that nobody fills.
_FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class _Utilities:
    """What Triton asks of a driver about a device and a binary."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class _Launcher:
    """Counts where the driver would start a kernel."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        self.counts[self.name] += 1


class _Driver:
    """A Hopper GPU, as far as Triton asks."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def _why_not(self: backend.TritonBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    return self.why_not_capability(90, dtype)


def _call(function: Callable[..., Any], call: Any, *rest: Any) -> Any:
    """What runs the engine, with autocast off: torch knows of none on DEVICE."""
    assert not torch.is_autocast_enabled("cuda")
    return function(call, *rest)


def _add_product(
    self: workspace.Workspace, sums: torch.Tensor, weights: torch.Tensor, block: torch.Tensor, *rest: Any
) -> None:
    """One operation, as on CUDA, where sums are float32 whatever is multiplied."""
    if sums.device == DEVICE:
        room = torch.empty(sums.shape, dtype=block.dtype, device=DEVICE)
        torch.addmm(room, weights, block, out=room)
    else:  # on a CPU, products of 16 bits take longer than their dispatch
        torch.addmm(_NUMBER, _NUMBER, _NUMBER, out=_NUMBER)


def _product(weights: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The same without sums to add to."""
    if weights.device == DEVICE:
        return torch.mm(weights, block)
    return torch.mm(_NUMBER, _NUMBER)


def _more_product(sums: torch.Tensor, weights: torch.Tensor, block: torch.Tensor) -> None:
    _add_product(None, sums, weights, block)


@contextlib.contextmanager
def absent_gpu() -> Iterator[None]:
    """Within it the triton backend serves tensors of DEVICE as those of a Hopper GPU."""
    patches = [
        mock.patch.object(driver, "_active", _Driver()),
        mock.patch.object(backend.TritonBackend, "why_not", _why_not),
        mock.patch.object(launch, "_capability", lambda device: 90),
        mock.patch.object(launch, "gpu_name", lambda device: "GPU"),
        mock.patch.object(launch, "multiprocessors", lambda device: 132),
        mock.patch.object(shared, "_without_autocast", _call),
        mock.patch.object(checks, "require_values", lambda x, name: None),
        mock.patch.object(workspace.Workspace, "accumulate", _add_product),
        mock.patch.object(whole_launch, "product", _product),
        mock.patch.object(whole_launch, "add_product", _more_product),
    ]
    with contextlib.ExitStack() as held:
        for patch in patches:
            held.enter_context(patch)
        launch.forget_tiles()
        held.callback(launch.forget_tiles)
        yield


class Launches(TorchDispatchMode):
    """Counts launches within it, by name: torch's operations that start a kernel, and our own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()

    def __enter__(self) -> Launches:
        self._plain = mock.patch.object(shared, "_is_plain", lambda x: True)  # though a mode watches
        self._plain.start()
        _Launcher.counts.clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._plain.stop()
        self.ours = Counter(_Launcher.counts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.torch[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All of them."""
        return self.torch.total() + self.ours.total()


def step_of(
    loss: str, n: int, d: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = DEVICE, **options: Any
) -> Callable[[], None]:
    """One step of a loss: value and all gradients, with a temperature that learns."""
    x, y = (torch.zeros(n, d, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    scale = torch.ones((), device=device, requires_grad=True)
    more: tuple[Any, ...] = ()
    if loss == "sigmoid":
        more = (torch.ones((), device=device, requires_grad=True),)
    elif loss == "decomposable":
        more = ((torch.zeros(n, device=device), torch.zeros(n, device=device)),)

    def step() -> None:
        for leaf in (x, y, scale, *more):
            if isinstance(leaf, torch.Tensor):
                leaf.grad = None
        getattr(ck, loss)(x, y, scale, *more, backend="triton", **options).backward()

    return step


def count(loss: str, n: int, d: int, **options: Any) -> Launches:
    """The launches of a step."""
    step = step_of(loss, n, d, **options)
    step()  # what is made once
    with Launches() as launches:
        step()
    return launches


def dense_step(n: int, d: int) -> Callable[[], None]:
    """One step of CLIP's loss as a score matrix and two cross entropies."""
    x, y = (torch.zeros(n, d, dtype=torch.float32, requires_grad=True) for _ in range(2))
    scale, target = torch.ones((), dtype=torch.float32, requires_grad=True), torch.arange(n)

    def step() -> None:
        for leaf in (x, y, scale):
            leaf.grad = None
        logits = scale * (x @ y.T)
        ((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2).backward()

    return step


def host_seconds(losses: Iterable[str], rounds: int = 1000) -> dict[str, float]:
    """The host's time for a step of each loss, and of the dense formula; the best of many, for others use the machine.

    They take turns.
    """
    steps = {loss: step_of(loss, 64, 16, device=torch.device("cpu")) for loss in losses}
    steps["dense"] = dense_step(8, 8)
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Prints launches and host time."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("losses", nargs="*", default=["clip_loss", "info_nce", "nt_xent", "sigmoid", "decomposable"])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with absent_gpu():
        seconds = host_seconds(arguments.losses)
        dense = seconds["dense"]
        for loss in arguments.losses:
            launches = count(loss, arguments.n, arguments.d)
            ours, others = dict(launches.ours), dict(launches.torch)
            host = 1e6 * seconds[loss]
            found[loss] = {
                "launches": launches.total, "host_us": host, "of_dense": seconds[loss] / dense,
                "ours": ours, "torch": others,
            }  # fmt: skip
            if not arguments.json:
                print(f"{loss:10} {launches.total} launches, {host:.0f} us, {seconds[loss] / dense:.2f} of dense;")
                print(f"           ours {ours}, torch's {others}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
