"""Compiles the Triton kernels for a GPU that is not there, and reads what the compiler made of them.

python tests/offline.py [architecture ...]     every shipped configuration, with registers, stack and instructions
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contrastive_kernels._triton import launch, score
from contrastive_kernels._triton.configs import Tile, shipped, work_of

_POINTERS = {"16-bit": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}


@dataclass(frozen=True)
class Case:
    """One kernel: what it leaves, for which sides, in which dtype, for which architecture."""

    capability: int
    precision: str
    dtype: str
    term: str
    weights: bool
    statistics: bool
    two_sided: bool
    tile: Tile
    #: a number of features that is a multiple of the tile's, and rows of whole vectors
    even: bool = True

    def __str__(self) -> str:
        outputs = "+".join(name for name in ("weights", "statistics") if getattr(self, name))
        sides = "both" if self.two_sided else "rows"
        return f"sm{self.capability}-{self.dtype}-{self.precision}-{self.term}-{outputs}-{sides}" + "-ragged" * (
            not self.even
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    registers: int
    stack: int
    shared: int
    ptx: str


def cases(capability: int) -> Iterator[Case]:
    """Every shipped configuration of an architecture x pair term x outputs x dtype."""
    outputs = [(False, True, False), (False, True, True), (True, False, False), (True, False, True)]
    outputs += [(True, True, False), (True, True, True)]
    tiles = {(precision, work): tile for member, precision, work, tile in shipped() if member == capability}
    for precision, dtypes in _POINTERS.items():
        for dtype in dtypes:
            for term in ("exponential", "sigmoid"):
                for weights, statistics, two_sided in outputs:
                    if term == "sigmoid" and two_sided:
                        continue  # its columns have no part
                    tile = tiles[precision, work_of(weights, statistics, two_sided)]
                    yield Case(capability, precision, dtype, term, weights, statistics, two_sided, tile)


def compile_score(case: Case) -> Compiled:
    """score_kernel for this case."""
    exponential, rows, cols = case.term == "exponential", True, case.two_sided
    pointers = {
        "x_ptr": case.dtype,
        "y_ptr": case.dtype,
        "params_ptr": "fp32",
        "columns_ptr": None,
        "col_bias_ptr": None,
        "row_normalizer_ptr": "fp32" if case.weights and exponential else None,
        "row_gain_ptr": "fp32" if case.weights else None,
        "col_normalizer_ptr": "fp32" if case.weights and cols else None,
        "col_gain_ptr": "fp32" if case.weights and cols else None,
        "weights_ptr": case.dtype if case.weights else None,
        "factor_ptr": "fp32" if case.weights else None,
        "row_partials_ptr": "fp32" if case.statistics else None,
        "col_partials_ptr": "fp32" if case.statistics and cols else None,
        "params_partials_ptr": "fp32" if case.weights else None,
    }
    tile = case.tile
    constants = {
        "TERM": launch.TERMS[case.term], "ROW": rows, "COL": cols, "COLUMNS": 0,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
        "EVEN_K": case.even, "INPUT_PRECISION": "ieee" if case.precision == "ieee" else "tf32", "UPCAST": False,
    }  # fmt: skip
    aligned = {"C", "D", "x_stride", "y_stride", "weights_stride"} if case.even else set()
    return _compile(score.score_kernel, case.capability, pointers, constants, aligned, tile.num_warps, tile.num_stages)


def compile_merge(capability: int, term: str) -> Compiled:
    """merge_kernel with everything it can do for a pair term."""
    names = ("row_state_ptr", "col_state_ptr", "row_partials_ptr", "col_partials_ptr", "params_partials_ptr")
    pointers: dict[str, str | None] = {**dict.fromkeys(names, "fp32"), "dparams_ptr": "fp64"}
    if term == "sigmoid":
        pointers["col_state_ptr"] = pointers["col_partials_ptr"] = None
    constants = {
        "TERM": launch.TERMS[term], "STATE_ROWS": 2 if term == "exponential" else 1, "BLOCK": 256,
    }  # fmt: skip
    return _compile(score.merge_kernel, capability, pointers, constants, set(), 4, 1)


def _compile(
    kernel: Any,
    capability: int,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    aligned: set[str],
    num_warps: int,
    num_stages: int,
) -> Compiled:
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants or pointers.get(name, "") is None:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name in pointers or name in aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a cubin: REG, STACK, LOCAL, ..."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", words)}


if __name__ == "__main__":
    print("triton", triton.__version__)
    for capability in map(int, sys.argv[1:] or ("80", "90", "100")):
        for case in cases(capability):
            made = compile_score(case)
            product = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in made.ptx), "no mma")
            print(
                f"{case!s:60} {made.registers:4} registers {made.stack:5} stack {made.shared:7} shared  {product}",
                flush=True,
            )
