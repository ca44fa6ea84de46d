"""What may be wrong with an argument, by its kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import contrastive_kernels as ck

#: A kind of argument gives what may be wrong with it, by what is.
Kind = Callable[[], dict[str, Any]]

#: Rows and features of x and y in every call.
N, D = 4, 3


class Strange:
    """A value that nothing expects."""

    def __repr__(self) -> str:
        return "<a strange value>"


def _masked(v: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.masked.masked_tensor(v, torch.ones_like(v, dtype=torch.bool))


def _nested(v: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([v, v], layout=layout)


def tensors_of_no_use(v: Tensor, *, meta: bool = True) -> dict[str, Any]:
    """Tensors with the values and the shape of v, and one thing wrong each."""
    wide = v if v.dim() else v[None]
    bad = {
        "a list": v.tolist(),
        "a string": "tensor",
        "a strange object": Strange(),
        "an array": v.numpy(),
        "sparse": v.to_sparse(),
        "nested": _nested(wide, torch.strided),
        "jagged": _nested(wide, torch.jagged),
        "mkldnn": wide.to(torch.float32).to_mkldnn(),
        "masked": _masked(v.clone()),
        "complex": v.to(torch.complex64),
        "boolean": v > 0,
    }
    if v.dim() == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bad["by compressed rows"] = v.to_sparse_csr()
    if meta:
        bad["on meta"] = v.to("meta")
    return bad


def features() -> dict[str, Any]:
    v = torch.eye(N, D)
    return tensors_of_no_use(v) | {
        "a vector": v[0],
        "of three dimensions": v[None],
        "of integers": v.long(),
        "float8": v.to(torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        "without features": v[:, :0],
        "of other features": torch.eye(N, D + 1),
        "of another dtype": v.double(),
    }


def rows() -> dict[str, Any]:
    """[..., D] of floating-point numbers."""
    v = torch.eye(N, D)
    return tensors_of_no_use(v) | {
        "of other features": torch.eye(N, D + 1),
        "of integers": v.long(),
        "one number": v[0, 0],
    }


def vector() -> dict[str, Any]:
    v = torch.ones(N)
    return {name: bad for name, bad in tensors_of_no_use(v).items() if name != "boolean"} | {
        "too long": torch.ones(N + 1),
        "a column": v[:, None],
        "of integers": v.long(),
    }


def weight() -> dict[str, Any]:
    return vector() | {"differentiable": torch.ones(N, requires_grad=True)}


def normalizer() -> dict[str, Any]:
    one = torch.zeros(N)
    pairs = {f"a pair with one that is {name}": (one, bad) for name, bad in vector().items()}
    return vector() | pairs | {"three": (one, one, one), "none": ()}


def table() -> dict[str, Any]:
    """[N, 1] of floating-point numbers."""
    return {**tensors_of_no_use(torch.ones(N, 1)), "of integers": torch.ones(N, 1).long(), "too long": torch.ones(9, 1)}


def counts() -> dict[str, Any]:
    """[N, 1] of integers."""
    bad = tensors_of_no_use(torch.ones(N, 1))
    return {name: value for name, value in bad.items() if name != "boolean"} | {"of floats": torch.ones(N, 1)}


def scale() -> dict[str, Any]:
    return _scalars(torch.tensor(2.0)) | {
        "of two elements": torch.ones(2),
        "of none": torch.ones(0),
        "an integer tensor": torch.tensor(2),
        "true": True,
        "a complex number": 1j,
        "infinite": float("inf"),
        "minus infinity": -float("inf"),
        "not a number": float("nan"),
        "too large for float32": 1e39,
        "too large for a float": 10**400,
        "too large to print": 10**5000,
        "a list of one": [4],
        "a dict": {},
    }


def _scalars(v: Tensor) -> dict[str, Any]:
    """Tensors of one element."""
    return {name: bad for name, bad in tensors_of_no_use(v).items() if name != "a list"}


def _numbers() -> dict[str, Any]:
    return {
        "a string": "1",
        "a list": [1.0],
        "true": True,
        "complex": 1j,
        "a tensor": torch.ones(3),
        "infinite": float("inf"),
        "not a number": float("nan"),
        "too large for a float": 10**400,
        "too large to print": -(10**5000),
        "a strange object": Strange(),
    }


def amount() -> dict[str, Any]:
    return _numbers() | {"negative": -1.0, "barely negative": -1e-300}


def positive_number() -> dict[str, Any]:
    return amount() | {"zero": 0.0, "zero that is negative": -0.0}


def part() -> dict[str, Any]:
    return amount() | {"more than 1": 1.5}


def positive_part() -> dict[str, Any]:
    return part() | {"zero": 0}


def mixture() -> dict[str, Any]:
    return part() | {"another word": "samples"}


def choice() -> dict[str, Any]:
    """One of some words, or a number."""
    bad = {name: value for name, value in _numbers().items() if name != "a string"}
    return bad | {"another word": "stores", "empty": "", "bytes": b"stored"}


def word() -> dict[str, Any]:
    return {
        "another word": "fast",
        "empty": "",
        "bytes": b"mean",
        "a number": 1,
        "true": True,
        "a list": [],
        "a dict": {},
        "a tensor": torch.ones(3),
        "a strange object": Strange(),
    }


def flag() -> dict[str, Any]:
    return {
        "a word": "False",
        "one": 1,
        "zero": 0,
        "a float": 1.0,
        "a tensor": torch.tensor(True),
        "a list": [],
        "a strange object": Strange(),
    }


def group() -> dict[str, Any]:
    """The ranks that share a loss."""
    return word() | {"a world that is not there": "world", "a list of ranks": [0, 1]}


def count() -> dict[str, Any]:
    return {
        "negative": -1,
        "a float": 1e9,
        "a word": "1",
        "true": True,
        "a list": [1],
        "a tensor": torch.tensor(1),
        "too large for torch": 2**63,
        "too large to print": 10**5000,
        "not a number": float("nan"),
        "a strange object": Strange(),
    }


def positive_count() -> dict[str, Any]:
    return count() | {"zero": 0}


def notional() -> dict[str, Any]:
    return positive_count() | {"another word": "datasets"}


def directions() -> dict[str, Any]:
    return positive_count() | {"three": 3}


def capability() -> dict[str, Any]:
    return positive_count() | {"a single digit": 9}


def generator() -> dict[str, Any]:
    return {"a seed": 1, "a word": "0", "a list": [], "a tensor": torch.ones(3), "a class": torch.Generator}


def positives() -> dict[str, Any]:
    index = torch.arange(N)
    bad = tensors_of_no_use(index)
    del bad["mkldnn"]  # of float32 alone
    return bad | {
        "a float": 1.0,
        "true": True,
        "negative": -1,
        "too large": 1,
        "too large for torch": 10**30,
        "of floats": torch.zeros(N),
        "too long": torch.zeros(N + 1, dtype=torch.int64),
        "outside": index + 1,
        "far outside": index - 2**62,
    }


def samples() -> dict[str, Any]:
    index = torch.arange(N)
    return {k: v for k, v in positives().items() if k != "outside"} | {
        "of 32 bits": index.int(),
        "behind the last": index + 10**6,
        "before the first": index - 1,
        "a matrix": index[:, None],
    }


def ids() -> dict[str, Any]:
    v = torch.arange(N)
    bad = {name: value for name, value in tensors_of_no_use(v).items() if name != "mkldnn"}
    return bad | {
        "of floats": torch.zeros(N),
        "too long": torch.zeros(N + 1, dtype=torch.int64),
        "a pair with a list": (v, [1]),
        "three": (v, v, v),
        "a pair with a sparse one": (v, v.to_sparse()),
    }


def labels() -> dict[str, Any]:
    return {name: value for name, value in ids().items() if "pair" not in name} | {"a pair": (torch.arange(N),) * 2}


def margin() -> dict[str, Any]:
    v = 0.1
    return {
        "a word": "0.1",
        "true": True,
        "a tensor": torch.tensor(v),
        "a pair of numbers": (v, v),
        "another word": ("absolute", v),
        "a word with a word": ("relative", "0.1"),
        "three": ("relative", v, v),
        "infinite": float("inf"),
        "not a number": ("relative", float("nan")),
    }


def relevance() -> dict[str, Any]:
    bad = {name: value for name, value in table().items() if name != "of integers"}
    return bad | {"negative": -torch.ones(N, 1), "infinite": torch.full((N, 1), torch.inf)}


def queue() -> dict[str, Any]:
    return {
        "a tensor": torch.eye(N, D),
        "a list": [],
        "a number": 1,
        "of other features": ck.FeatureQueue(N, D + 1),
        "on meta": ck.FeatureQueue(N, D).to("meta"),
    }


def correction() -> dict[str, Any]:
    """A number from 0 to below 1."""
    return part() | {"one": 1.0}


def lengths() -> dict[str, Any]:
    return cutoffs() | {"none": []}


def factors() -> dict[str, Any]:
    return {"a number": 1.0, "a tensor": torch.ones(2), "too many": (1.0,) * 9, "negative": (1.0, -1.0),
            "words": ("1", "2"), "infinite": (1.0, float("inf"))}  # fmt: skip


def cutoffs() -> dict[str, Any]:
    return {
        "a number": 5,
        "a word": "15",
        "a tensor": torch.ones(3),
        "zero": [0],
        "a float": [1.0],
        "true": [True],
        "too large for torch": [10**30],
        "a set": {1},
    }


def direction() -> dict[str, Any]:
    return {"negative": -1, "two": 2, "true": True, "a float": 1.0, "a word": "0", "a list": [], "large": 10**30}


def device() -> dict[str, Any]:
    return {"unknown": "nope", "a float": 1.5, "true": True, "a list": [], "empty": "", "bytes": b"cpu"}


def device_that_is_here() -> dict[str, Any]:
    absent = {} if torch.cuda.is_available() else {"not here": "cuda"}
    return device() | absent | {"far away": "cuda:99"}


def dtype() -> dict[str, Any]:
    return {
        "a word": "float32",
        "integer": torch.int64,
        "complex": torch.complex64,
        "a list": [],
        "a class": float,
        "a tensor": torch.ones(3),
    }


def folder() -> dict[str, Any]:
    return {"empty": "", "blank": "  ", "a number": 1, "bytes": b"memory", "a list": [], "with a zero": "a\0b"}


def ratio() -> dict[str, Any]:
    bad = positive_number()
    one = torch.tensor(1.5, dtype=torch.float64)
    return bad | _scalars(one) | {"nan in a tensor": one * torch.nan, "an integer tensor": torch.tensor(2)}


def options() -> dict[str, Any]:
    return {"a list": [("t", 0.5)], "a word": "t", "a number": 1, "unknown": {"tt": 0.5}, "keys of numbers": {1: 2}}


def function() -> dict[str, Any]:
    return {"a word": "loss", "a number": 1, "a list": []}


def encoder() -> dict[str, Any]:
    v = torch.eye(N, D)
    return function() | {
        "one that returns a tensor": lambda batch: v,
        "one that returns three": lambda batch: (v, v, v),
        "one that returns one": lambda batch: (v,),
        "one that returns fewer rows": lambda batch: (v[:2], v[:2]),
        "one that returns nothing": lambda batch: None,
    }


def sequence() -> dict[str, Any]:
    return {"a number": 1, "a word": "ab", "a generator": (i for i in ()), "longer": [None] * 7, "empty": []}


def expectation() -> dict[str, Any]:
    return {"a number": 1, "a tensor": torch.ones(3), "a dict": {}, "a tuple": (1, 2)}


def base() -> dict[str, Any]:
    return {"a word": "clip", "a number": 1, "a tensor": torch.ones(3)}


def encoders() -> dict[str, Any]:
    """For two inputs of N rows."""
    linear = torch.nn.Linear(D, 2)
    return {
        "a number": 3,
        "a word": "linear",
        "a list of one": [linear],
        "a list with a number": [linear, 3],
        "one that gives a pair": lambda v: (linear(v), linear(v)),
        "one that gives a dict": lambda v: {"features": linear(v)},
        "one that gives twice the rows": lambda v: torch.cat([linear(v), linear(v)]),
        "one that gives a number": lambda v: linear(v).sum(),
    }


def inputs() -> dict[str, Any]:
    """Of several encoders, each by samples."""
    v = torch.eye(N, D)
    return {"a tensor": v, "none": (), "a dict": {"x": v, "y": v}, "with a number": (v, 3),
            "with one of no dimension": (v, v[0, 0]), "with one of two lengths": (v, (v, v[1:])),
            "with an empty tuple": (v, ())}  # fmt: skip


def loss() -> dict[str, Any]:
    """Of two matrices of features."""
    return {"a number": 3, "a word": "clip_loss", "one that gives a float": lambda x, y: 1.0,
            "one that gives rows": lambda x, y: x[:, 0],
            "one that gives a dict": lambda x, y: {"loss": x.sum()}}  # fmt: skip


def context() -> dict[str, Any]:
    """What makes or does something."""
    return {"a number": 3, "true": True, "a word": "no_sync", "a list": [], "a strange object": Strange()}
