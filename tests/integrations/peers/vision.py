"""torchvision beside a torch that its operators were not built for (CUDA's beside a CPU's): nothing here calls them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float t) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
)


def make_importable() -> torch.library.Library | None:
    """Declares the operators whose absence ends torchvision's import, if they do not load."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(path))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(operator)
        return library


HELD = make_importable()
