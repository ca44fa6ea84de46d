"""What may be wrong with the arguments of multiple negatives ranking and of global losses, and with temperatures."""

from __future__ import annotations

from typing import Any

import torch
from bad_values import D, N, positive_number, scale, tensors_of_no_use


def ways() -> dict[str, Any]:
    first = "query_to_doc"
    return {"a word": first, "a number": 1, "none": (), "another word": (first, "doc_to_docs"), "twice": (first, first),
            "without the first": ("doc_to_doc",), "numbers": (1, 2)}  # fmt: skip


def hard_negatives() -> dict[str, Any]:
    v = torch.ones(N, 2, D)
    return tensors_of_no_use(v) | {
        "of two dimensions": v[:, 0],
        "too few": v[1:],
        "of other features": torch.ones(N, 2, D + 1),
        "of integers": v.long(),
        "of another dtype": v.double(),
    }


def guide() -> dict[str, Any]:
    v = torch.eye(N, D)
    return {"a tensor": v, "a number": 1, "one": (v,), "three": (v, v, v), "of other lengths": (v, v[1:]),
            "too few": (v[1:], v[1:]), "of words": ("a", "b"), "of integers": (v.long(), v.long()),
            "of other features": (v, v[:, 1:]), "sparse": (v.to_sparse(), v)}  # fmt: skip


def guided() -> dict[str, Any]:
    v, hard = torch.eye(N, D), torch.ones(N, 2, D)
    return {"a tensor": v, "a number": 1, "without negatives": (v, v), "of other lengths": (v, v[1:], hard),
            "too few": (v[1:], v[1:], hard[1:]), "of other negatives": (v, v, hard[:, :1]), "of words": ("a", "b", "c"),
            "of integers": (v.long(), v.long(), hard.long()), "sparse": (v.to_sparse(), v, hard)}  # fmt: skip


def bounds() -> dict[str, Any]:
    return {"a number": 0.1, "three": (0.1, 0.2, 0.3), "words": ("0", "1"), "the other way round": (1.0, 0.001),
            "zero": (0.0, 1.0), "infinite": (0.001, float("inf"))}  # fmt: skip


def betas() -> dict[str, Any]:
    return {"a number": 0.9, "three": (0.9, 0.9, 0.9), "words": ("0", "1"), "one": (0.9, 1.0), "below": (-0.1, 0.9)}


def temperature() -> dict[str, Any]:
    """Of a call; a number, or a tensor of one element or of [N]."""
    return positive_number() | {n: v for n, v in scale().items() if isinstance(v, torch.Tensor)} | {"tiny": 1e-320}
