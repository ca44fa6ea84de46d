"""How a kernel starts: Triton's own way the first time, then directly: that way takes longer than a small kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .score import score_kernel

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

__all__ = ["INTERPRETED", "TRITON_VERSION", "Arguments", "compiled_members", "may_start_directly", "start", "starter"]

#: (major, minor)
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
#: The kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(score_kernel, triton.JITFunction)

#: The first and the last version whose compiled kernels are known to start as they do here: what starts them is none of
#: Triton's public interface. Others start Triton's own way.
_DIRECT_VERSIONS = (3, 4), (3, 9)


class _Compiled(NamedTuple):
    """A kernel for one GPU, and the constants that stand behind its arguments."""

    kernel: Any
    constants: tuple[Any, ...]


#: By kernel, GPU, constants and what Triton specialises arguments by.
_compiled: dict[tuple[Any, ...], _Compiled] = {}


class Arguments:
    """A kernel's arguments in its order, tensors, numbers and None; several kernels may share them."""

    __slots__ = ("key", "raw", "values")

    def __init__(self, *values: Any) -> None:
        self.values = values
        #: addresses in the tensors' places
        self.raw = raw = [v if v.__class__ in _PLAIN else v.data_ptr() for v in values]
        self.key = tuple([_kind(v) if v.__class__ in _PLAIN else (v.dtype, r % 16 == 0) for v, r in zip(values, raw)])


_PLAIN: frozenset[Any] = frozenset((type(None), int, float, TensorDescriptor))


def _kind(value: Any) -> object:
    """What Triton specialises a number by: 1, multiples of 16, and what passes 32 bits; a descriptor by its block."""
    if value.__class__ is TensorDescriptor:
        return value.base.dtype, *value.block_shape
    if value.__class__ is not int:
        return value.__class__
    return 1 if value == 1 else (value % 16 == 0, -0x80000000 <= value < 0x80000000)


def start(kernel: Any, programs: int, arguments: Arguments, constants: dict[str, Any]) -> Any:
    """Starts `programs` programs on the current stream of the current GPU; the compiled kernel.

    Constants, the kernel's constexprs and options, always come in the same order.
    """
    if not may_start_directly():
        return _start_by_triton(kernel, programs, arguments, constants)
    device = driver.active.get_current_device()
    key = (id(kernel), device, arguments.key, *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        made = _start_by_triton(kernel, programs, arguments, constants)
        if compiled_members(made) is not None:
            rest = kernel.arg_names[len(arguments.values) :]
            _compiled[key] = _Compiled(made, tuple([constants[name] for name in rest]))
        return made
    made = compiled.kernel
    made.run(
        programs, 1, 1, driver.active.get_current_stream(device), made.function, made.packed_metadata, None, None, None,
        *arguments.raw, *compiled.constants,
    )  # fmt: skip
    return made


def _start_by_triton(kernel: Any, programs: int, arguments: Arguments, constants: dict[str, Any]) -> Any:
    """The compiled kernel. Triton 3.10 will switch fused multiply-add off unless it is asked for."""
    return kernel[(programs,)](*arguments.values, **constants, enable_fp_fusion=True)


def compiled_members(made: Any) -> tuple[Any, Any, Any] | None:
    """What starts a compiled kernel: (launcher, function, metadata); None where it is of another kind."""
    try:
        return made.run, made.function, made.packed_metadata
    except AttributeError:
        return None


def starter(run: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a launcher calls in the end, and what it adds to its arguments behind the function.

    Triton 3.6's finds each time anew that a kernel wants no memory of its own, in Python.
    """
    wanted = ("global_scratch_size", "profile_scratch_size")
    if TRITON_VERSION != (3, 6) or any(getattr(run, name, 1) for name in wanted) or not callable(run.launch):
        return run, ()
    return run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)


def may_start_directly() -> bool:
    """Whether kernels may start without Triton's own way: of a known version, and no profiler wants to hear of it."""
    if INTERPRETED or knobs is None or not _DIRECT_VERSIONS[0] <= TRITON_VERSION <= _DIRECT_VERSIONS[1]:
        return False
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return not any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
