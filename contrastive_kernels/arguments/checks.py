"""What the losses ask of their arguments: every error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import registry
from ..panels.size import score_dtype
from . import hints
from .index import checked_index
from .options import Engine

__all__ = [
    "Refused",
    "autocasts",
    "check_backend",
    "check_count",
    "check_dense",
    "check_device",
    "check_distribution",
    "check_engine",
    "check_features",
    "check_flag",
    "check_folder",
    "check_generator",
    "check_matrix",
    "check_number",
    "check_pair",
    "check_positives",
    "check_reduction",
    "check_scale",
    "check_several_positives",
    "check_vector",
    "check_workspace",
    "is_number",
    "is_shared",
    "normalized",
    "recomputing",
    "require_equal_lengths",
    "require_one_process",
    "require_vector",
    "scale_tensor",
    "shown",
]

#: The features of losses that are defined on the sphere, by their names.
_OF_UNIT_LENGTH = {("image_features", "text_features"), ("z1", "z2")}
#: The largest integer that torch takes.
_LARGEST_INT = 2**63 - 1


def check_features(
    x: Any, y: Any, names: tuple[str, str], normalize: bool, *, matching: bool = False, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Two feature matrices [N, D], [M, D] (`matching`: N = M) of one dtype and device, in autocast's dtype if any.

    `padded`: rows that hold NaN may be padding, and get no gradient.
    """
    may_hint = "lengths" in hints.unseen and normalize is False and names in _OF_UNIT_LENGTH
    if normalize is False and _need_no_change(x, y, matching):
        if may_hint:
            hints.look_at_lengths(x, names[0])
        return x, y
    _, features = check_matrix(x, names[0])
    _, others = check_matrix(y, names[1])
    if features != others:
        raise ValueError(
            f"{names[0]} and {names[1]}: expected the same number of features D; got {features} and {others}"
        )
    if features == 0:
        raise ValueError(f"{names[0]}: expected at least one feature; got shape {list(x.shape)}")
    if x.device != y.device:
        raise ValueError(f"{names[0]} and {names[1]}: expected one device; got {x.device} and {y.device}")
    require_values(x, names[0])
    if check_flag(normalize, "normalize"):
        x, y = normalized(x, padded), normalized(y, padded)
    if autocasts(x.device.type):  # (which leaves float64 alone, and so do we)
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = (v if v.dtype == torch.float64 else v.to(dtype) for v in (x, y))
    if x.dtype != y.dtype:
        raise TypeError(f"{names[0]} and {names[1]}: expected one dtype; got {x.dtype} and {y.dtype}")
    if matching:
        require_equal_lengths(x, y, names)
    if may_hint:  # of features that are right otherwise
        hints.look_at_lengths(x, names[0])
    return x, y


def _need_no_change(x: Any, y: Any, matching: bool) -> bool:
    """Whether two plain matrices are what is asked for: overhead dominates small batches."""
    if type(x) is not Tensor or type(y) is not Tensor or x.device != y.device or not (x.is_cpu or x.is_cuda):
        return False
    dtype, strided = x.dtype, torch.strided
    if dtype not in _DTYPES or y.dtype is not dtype or x.layout is not strided or y.layout is not strided:
        return False
    if x.is_nested or y.is_nested or x.dim() != 2 or y.dim() != 2:
        return False
    if torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda"):
        return False
    (rows, features), (others, width) = x.shape, y.shape
    return bool(0 < features == width) and not (matching and rows != others)


def check_matrix(value: Any, name: str) -> torch.Size:
    """The shape of a dense matrix [N, D] of a floating dtype that the losses take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [N, D]; got {type(value).__name__}")
    check_dense(value, name)
    shape = value.shape
    if len(shape) != 2:
        raise ValueError(f"{name}: expected 2 dimensions [N, D]; got shape {list(shape)}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64; got {value.dtype}")
    return shape


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dense(value: Tensor, name: str) -> None:
    """A tensor that is a block of numbers: not sparse, nested, masked or spread over processes."""
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter and kind.__module__.startswith(_NOT_DENSE):
        raise TypeError(f"{name}: expected a dense tensor of this process; got {kind.__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor; got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor; got layout {value.layout}")


#: Modules whose tensors say that they are strided and are not.
_NOT_DENSE = ("torch.masked", "torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._shard")


def normalized(x: Tensor, padded: bool = False) -> Tensor:
    """The rows of x [N, D] over their norms, in the dtype of the scores; a zero row stays, without gradient.

    `padded`: so does one that holds NaN, which nobody may read.
    """
    v = x.to(score_dtype(x.dtype))
    if padded:
        lost = ~x.detach().isfinite().all(1, keepdim=True)
        return normalized(v.masked_fill(lost, 0.0)).masked_fill(lost, torch.nan).to(x.dtype)
    largest = v.detach().abs().amax(1, keepdim=True)  # so that no square overflows, and none vanishes
    zero = largest == 0
    v = v / largest.masked_fill(zero, 1.0)
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True).masked_fill(zero, 1.0)
    return (v / norm).masked_fill(zero, 0.0).to(x.dtype)


def require_values(x: Tensor, name: str) -> None:
    """A tensor that holds values."""
    if x.is_meta:
        raise ValueError(f"{name}: expected a tensor that holds values; got one on the meta device")


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of devices; some, like "meta", have none."""
    # Before torch 2.7 the compiler cannot trace the question whether a device has autocast; what it compiles for has.
    known = device in ("cpu", "cuda") or torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def require_equal_lengths(x: Tensor, y: Tensor, names: tuple[str, str]) -> None:
    """Matching rows."""
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]}: expected the same number of rows; got {x.shape[0]} and {y.shape[0]}"
        )


def check_positives(
    positives: Any, x: Tensor, y: Tensor, allow_missing: bool = False
) -> tuple[Tensor | None, int | None]:
    """The positives as (indices [N], None) or (None, offset); an index of -1 for none if that is allowed."""
    rows, columns = x.shape[0], y.shape[0]
    if isinstance(positives, Tensor):
        return _columns(positives, x, columns, allow_missing, several=False), None
    offset = 0 if positives is None else positives
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(
            f"positives: expected None, an int offset or an int64 tensor [N]; got {type(positives).__name__}"
        )
    if offset < 0 or offset + rows > columns:
        raise ValueError(
            f"positives: expected 0 <= offset <= M - N, so that row i's positive is row i + offset of y; "
            f"got offset {shown(offset)} with N = {rows} and M = {columns}"
        )
    return None, cast(int, offset)


def check_several_positives(positives: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The columns of every row's positives [N, P] as int64, -1 for none."""
    return _columns(positives, x, y.shape[0], True, several=True)


def _columns(positives: Tensor, x: Tensor, columns: int, allow_missing: bool, *, several: bool) -> Tensor:
    """Indices among so many columns [N], or [N, P]."""
    check_dense(positives, "positives")
    if positives.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positives: expected int64 indices; got {positives.dtype}")
    rows, shape = x.shape[0], positives.shape
    if several and not (len(shape) == 2 and shape[0] == rows and shape[1]):
        raise ValueError(f"positives: expected shape [{rows}, P], P at least 1; got {list(shape)}")
    if not several and shape != (rows,):
        raise ValueError(f"positives: expected shape [{rows}], one per row of x; got {list(shape)}")
    if positives.device != x.device:
        raise ValueError(f"positives: expected device {x.device}; got {positives.device}")
    return checked_index(positives, columns, allow_missing)


def check_vector(value: Any, name: str, length: int, x: Tensor, differentiable: bool = False) -> Tensor:
    """A vector [length] on x's device, in the dtype of the scores."""
    require_vector(value, name, length, x, differentiable)
    dtype = score_dtype(x.dtype)
    return value if value.dtype is dtype and value.is_contiguous() else value.to(dtype).contiguous()


def require_vector(value: Any, name: str, length: int, x: Tensor, differentiable: bool = False) -> None:
    """A vector [length] on x's device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [{length}]; got {type(value).__name__}")
    check_dense(value, name)
    if value.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}]; got {list(value.shape)}")
    if not value.is_floating_point() and not (name == "weight" and value.dtype == torch.bool):
        raise TypeError(f"{name}: expected a floating-point tensor; got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}; got {value.device}")
    if not differentiable and value.requires_grad:
        raise ValueError(f"{name}: it is not differentiated, so it must not require a gradient; got requires_grad=True")


def check_reduction(reduction: Any) -> str:
    """One of the three reductions."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none'; got {shown(reduction)}")
    return reduction


def check_workspace(workspace_bytes: Any) -> int | None:
    """A positive number of bytes, or None for what suits the device."""
    if workspace_bytes is None or (type(workspace_bytes) is int and 0 < workspace_bytes <= _LARGEST_INT):
        return workspace_bytes
    return check_count(workspace_bytes, "workspace_bytes", what="a positive number of bytes")


def check_count(value: Any, name: str, least: int = 1, what: str = "") -> int:
    """An int of at least so much that torch takes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int; got {_kind(value)}")
    if value < least:
        raise ValueError(f"{name}: expected {what or f'at least {least}'}; got {shown(value)}")
    if value > _LARGEST_INT:
        raise ValueError(f"{name}: expected less than 2**63; got {shown(value)}")
    return value


def check_flag(value: Any, name: str) -> bool:
    """A bool: the string "False" would count as true."""
    if value is True or value is False:
        return bool(value)
    raise TypeError(f"{name}: expected a bool; got {_kind(value)}")


def check_generator(generator: Any, device: torch.device | None = None) -> torch.Generator | None:
    """None or a generator, on this device where it draws there."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None; got {type(generator).__name__}")
    if device is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one of device {device}; got one of {generator.device}")
    if recomputing() and not _is_default(generator):
        raise RuntimeError(
            "generator: expected None under activation checkpointing, which runs the forward pass again and restores "
            "the default generators alone; what this one draws now differs from what the loss was made of"
        )
    return generator


def recomputing() -> bool:
    """Whether autograd's engine runs: only a recomputation calls a loss within backward."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and not torch.compiler.is_compiling() and current() != -1


def _is_default(generator: torch.Generator) -> bool:
    """Whether it is one of torch's own."""
    default = torch.default_generator if generator.device.type == "cpu" else None
    if generator.device.type == "cuda":
        default = torch.cuda.default_generators[generator.device.index or 0]
    return generator is default


def check_device(device: Any, *, here: bool = False) -> torch.device:
    """A device that torch knows; `here`: on which a tensor can be made."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name; got {type(device).__name__}")
    try:
        found = torch.device(device)
        if here:
            torch.empty(0, dtype=torch.float32, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # every device has its own
        expected = "one that is here" if here else "one that torch knows"
        raise ValueError(f"device: expected {expected}; got {str(device)!r} ({str(error).splitlines()[0]})") from None
    return found


def check_folder(path: Any, name: str) -> Path:
    """The path of a folder; the empty one would be wherever the process happens to be."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{name}: expected a path; got {type(path).__name__}")
    if not str(path).strip() or "\0" in str(path):
        raise ValueError(f"{name}: expected the path of a folder; got {shown(str(path))}")
    return Path(path)


def shown(value: Any) -> str:
    """A wrong value as messages show it, whatever its length."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    """A type's name as messages show it: NumPy's bool is no bool."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_backend(backend: Any) -> str:
    """A backend's name, or "" for the registry's choice. Whether it can serve is known where it runs."""
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected None or a name; got {type(backend).__name__}")
    return registry.get(backend).name


def is_number(value: Any) -> bool:
    """A real number of Python, or one that passes for it."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(value: Any, name: str, positive: bool) -> float:
    """A Python number: above 0, or at least 0."""
    if type(value) is float and 0.0 < value < float("inf"):
        return value
    if not is_number(value):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    number = float("inf") if abs(value) > sys.float_info.max else float(value)
    if not (number > 0 if positive else number >= 0) or number == float("inf"):
        expected = f"a finite number {'above 0' if positive else 'of at least 0'}"
        raise ValueError(f"{name}: expected {expected}; got {shown(value)}")
    return number


def check_pair(value: Any, name: str) -> tuple[Any, Any]:
    """A pair for rows and columns."""
    if not isinstance(value, Sequence) or len(value) != 2:
        got = f"{type(value).__name__} of length {len(value)}" if isinstance(value, Sequence) else type(value).__name__
        raise TypeError(f"{name}: expected a pair of tensors for rows and columns; got {got}")
    return value[0], value[1]


@dataclass(frozen=True)
class Refused:
    """In the place of a scale: what is wrong with the temperature that it was to be made of."""

    error: Exception


def check_scale(x: Tensor, value: Any, name: str = "logit_scale") -> Tensor | float:
    """A number that fits the dtype of the scores, or a tensor of one element on x's device, as it is."""
    if isinstance(value, Tensor):
        check_dense(value, name)
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a float or a tensor of one element; got shape {list(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor; got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, where the features are; got {value.device}")
        if "scale" in hints.unseen and name == "logit_scale" and isinstance(value, torch.nn.Parameter):
            hints.look_at_scale(value)
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return float(value)
    if isinstance(value, Refused):
        raise value.error
    if not is_number(value):
        raise TypeError(f"{name}: expected a float or a tensor of one element; got {type(value).__name__}")
    largest = torch.finfo(score_dtype(x.dtype)).max
    if not -largest <= value <= largest:  # (exactly: a float might overflow)
        raise ValueError(f"{name}: expected a finite number of at most {largest:.3g}; got {shown(value)}")
    return float(value)


def scale_tensor(x: Tensor, value: Any, name: str = "logit_scale") -> Tensor:
    """The same as a 0-d tensor in the dtype of the scores, differentiable and without synchronisation."""
    value, dtype = check_scale(x, value, name), score_dtype(x.dtype)
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype)
    return torch.full((), value, dtype=dtype, device=x.device)


def check_engine(backend: Any, workspace_bytes: Any) -> Engine:
    """The engine's two arguments."""
    return Engine(check_backend(backend), check_workspace(workspace_bytes))


def check_distribution(gradients: Any, strategy: Any, uneven: Any) -> None:
    """How several processes share a loss, beside which."""
    if not isinstance(gradients, str) or gradients not in ("average", "sum"):
        raise ValueError(f"gradients: expected 'average' or 'sum'; got {shown(gradients)}")
    if not isinstance(strategy, str) or strategy not in ("auto", "replicated", "strips", "grid", "ring"):
        raise ValueError(f"strategy: expected 'auto', 'replicated', 'strips', 'grid' or 'ring'; got {shown(strategy)}")
    check_flag(uneven, "uneven")


def is_shared(group: Any, gradients: Any, strategy: Any, uneven: Any) -> bool:
    """Whether other processes may have a part in a loss; where none has, checks what is said of them."""
    shared = group is not None and group is not False
    if shared and isinstance(group, str) and group == "auto":
        distributed = torch.distributed
        shared = distributed.is_available() and distributed.is_initialized()
    if not shared:
        check_distribution(gradients, strategy, uneven)
    return shared


def require_one_process(name: str) -> None:
    """What is not there over the ranks of a group: leaving out their rows silently would train another loss."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"{name}: expected a single process; got a process group of {distributed.get_world_size()}, the rows of "
            "whose other processes would be left out"
        )
