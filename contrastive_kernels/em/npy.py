"""The header of a .npy file, as numpy writes it: tables on a disk that everybody can read."""

from __future__ import annotations

import ast
import sys

import torch

__all__ = ["HEADER_BYTES", "npy_header", "read_npy_header"]


#: Of a file's beginning. numpy aligns the data to 64 bytes and ends up here for every table of two axes.
HEADER_BYTES = 128
_MAGIC = b"\x93NUMPY\x01\x00"
_KINDS = {torch.float64: "f8", torch.int32: "i4"}


def npy_header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """Version 1.0, in this machine's byte order and C order; the data follows."""
    order = "<" if sys.byteorder == "little" else ">"
    text = f"{{'descr': '{order}{_KINDS[dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
    length = HEADER_BYTES - len(_MAGIC) - 2
    return _MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


def read_npy_header(data: bytes) -> str:
    """What a file's first bytes declare, in words such as "<f8 [4, 2]"."""
    if not data.startswith(_MAGIC):
        return "no .npy file of version 1.0"
    length = int.from_bytes(data[8:10], "little")
    try:
        declared = ast.literal_eval(data[10 : 10 + length].decode("latin1").strip())
        order = " in Fortran order" if declared["fortran_order"] else ""
        offset = "" if length + 10 == HEADER_BYTES else f" behind a header of {length + 10} bytes"
        return f"{declared['descr']} {list(declared['shape'])}{order}{offset}"
    except (ValueError, SyntaxError, KeyError, TypeError):
        return "a damaged header"
