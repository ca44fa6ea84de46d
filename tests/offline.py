"""Compiles the Triton kernels for a GPU that is not there, and reads what the compiler made of them.

python tests/offline.py [architecture ...]     every shipped configuration, with registers, stack and instructions
python tests/offline.py --check                those of 16 bits on Hopper: exits with 1 where one breaks its bounds
python tests/offline.py --write                the table of docs/performance.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from offline_cases import Case, all_cases, capped_cases, cases, guided_cases, kept_cases, persistent_cases
from thorough import every
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contrastive_kernels._triton import kept, launch, merge, persistent, score
from contrastive_kernels._triton.configs import PersistentTile, Tile, rest_of

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/performance.md"

#: 32-bit registers of a multiprocessor, and its bytes of shared memory (CUDA C++ Programming Guide, table of compute
#: capabilities).
_REGISTERS = 65536
SHARED_MEMORY = {80: 167_936, 86: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
#: Instructions of a warp for each of a thread's scores, after the product, on Hopper: what Triton 3.6 and 3.9 make of a
#: usual tile, and a tenth more.
MOST_INSTRUCTIONS = {
    "exponential-statistics-rows": 8,
    "exponential-statistics-both": 19,
    "exponential-weights-rows": 12,
    "exponential-weights-both": 13,
    "exponential-weights+statistics-rows": 15,
    "exponential-weights+statistics-both": 26,
    "sigmoid-statistics-rows": 13,
    "sigmoid-weights-rows": 15,
    "sigmoid-weights+statistics-rows": 26,
    "exponential-weights-rows-persistent": 14,
    "exponential-kept+statistics-rows": 14,
    "exponential-kept+statistics-both": 31,
}
#: The same where rows, and columns, have ceilings.
MOST_INSTRUCTIONS_CAPPED = {
    "exponential-statistics-rows": 19,
    "exponential-statistics-both": 38,
    "exponential-weights-rows": 16,
    "exponential-weights-both": 21,
    "exponential-weights+statistics-rows": 24,
    "exponential-weights+statistics-both": 54,
}
#: ... or a guide.
MOST_INSTRUCTIONS_GUIDED = {
    "exponential-statistics-rows": 15,
    "exponential-statistics-both": 35,
    "exponential-weights-rows": 19,
    "exponential-weights-both": 51,
    "exponential-weights+statistics-rows": 26,
    "exponential-weights+statistics-both": 65,
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case."""

    registers: int
    stack: int
    shared: int
    threads: int
    ptx: str
    #: instructions of a warp after the product, for each score that a thread holds, in a tile of which no pair is left
    #: out; those of branches that it seldom takes count too
    per_score: float

    def programs(self, capability: int) -> int:
        """How many run on a multiprocessor at once."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(_REGISTERS // registers, SHARED_MEMORY[capability] // (self.shared + 1024), 2048 // self.threads)


def compile_score(case: Case) -> Compiled:
    """score_kernel for this case, or persistent_kernel."""
    if isinstance(case.tile, PersistentTile):
        return _compile_persistent(case, case.tile)
    return _compile_tile(score.score_kernel, case, case.tile, {})


def _compile_persistent(case: Case, tile: PersistentTile) -> Compiled:
    exponential, cols, kernel = case.term == "exponential", case.two_sided, persistent.persistent_kernel
    weighs = case.weights and not case.keeps
    pointers = {
        "params_ptr": "fp32",
        "columns_ptr": None,
        "col_bias_ptr": None,
        **_pointers_of_pairs(case),
        "line_ptr": "fp32" if weighs else None,
        "row_referred_ptr": "fp32" if weighs else None,
        "col_referred_ptr": "fp32" if weighs and cols else None,
        "factor_ptr": "fp32" if weighs else None,
        "row_partials_ptr": "fp32" if case.statistics else None,
        "col_partials_ptr": "fp32" if case.statistics and cols and exponential else None,
        "params_partials_ptr": "fp32" if weighs else None,
        **_pointers_of_moments(case),
        "unusual_ptr": "fp32",
    }
    constants = {
        "TERM": launch.TERMS[case.term], "ROW": True, "COL": cols, "COLUMNS": 0, "EQUAL_IDS": int(case.labels),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
        "PARTS": tile.parts, "UPCAST": False,
    }  # fmt: skip
    descriptors = {"x_desc": (tile.block_m, tile.block_k), "y_desc": (tile.block_n, tile.block_k)}
    if case.weights:
        descriptors["weights_desc"] = tile.block_m, tile.part.block_n
    else:
        constants["weights_desc"] = None
    blocks = {name: f"tensordesc<{case.dtype}[{rows},{cols}]>" for name, (rows, cols) in descriptors.items()}
    return _compile(kernel, case.capability, pointers, constants, set(), tile, blocks)


def compile_rest(case: Case) -> Compiled:
    """rest_kernel for this case."""
    if isinstance(case.tile, PersistentTile):
        case = replace(case, tile=case.tile.part)
    rest = rest_of(case.tile)
    return _compile_tile(score.rest_kernel, case, rest, {"PIECE": rest.block_n, "TILES": launch.REST_TILES})


def _compile_tile(kernel: Any, case: Case, tile: Tile, more: dict[str, Any]) -> Compiled:
    exponential, cols = case.term == "exponential", case.two_sided
    weighs = case.weights and not case.keeps
    pointers = {
        "x_ptr": case.dtype,
        "y_ptr": case.dtype,
        "params_ptr": "fp32",
        "columns_ptr": None,
        "col_bias_ptr": None,
        **_pointers_of_pairs(case),
        "row_normalizer_ptr": "fp32" if weighs and exponential else None,
        "row_gain_ptr": "fp32" if weighs else None,
        "col_normalizer_ptr": "fp32" if weighs and cols else None,
        "col_gain_ptr": "fp32" if weighs and cols else None,
        "weights_ptr": case.dtype if case.weights else None,
        "factor_ptr": "fp32" if weighs else None,
        "row_partials_ptr": "fp32" if case.statistics else None,
        "col_partials_ptr": "fp32" if case.statistics and cols else None,
        "params_partials_ptr": "fp32" if weighs else None,
        **_pointers_of_moments(case),
        "unusual_ptr": "fp32",
    }
    constants = {
        "TERM": launch.TERMS[case.term], "ROW": True, "COL": cols, "COLUMNS": 0, "EQUAL_IDS": int(case.labels),
        "BLOCK_M": tile.block_m, "BLOCK_N": case.tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
        "EVEN_K": case.even, "INPUT_PRECISION": "ieee" if case.precision == "ieee" else "tf32", "UPCAST": False,
        "EVEN_E": True, "BLOCK_E": 16 if case.guide == "fp32" else tile.block_k,
        "GUIDE_PRECISION": "ieee" if case.guide == "fp32" else "tf32", **more,
    }  # fmt: skip
    aligned = {"C", "D", "x_stride", "y_stride", "weights_stride"} if case.even else set()
    aligned |= {"E", "row_guide_stride", "col_guide_stride"}
    return _compile(kernel, case.capability, pointers, constants, aligned, tile)


def _pointers_of_pairs(case: Case) -> dict[str, str | None]:
    cols = case.two_sided
    labels = ("i64", "i64", "fp32", "fp32" if cols else None) if case.labels else (None,) * 4
    names = ("row_ids_ptr", "col_ids_ptr", "row_target_ptr", "col_target_ptr")
    ceilings = {"row_ceiling_ptr": "fp32", "col_ceiling_ptr": "fp32" if cols else None}
    guide = dict.fromkeys(("row_guide_ptr", "col_guide_ptr"), case.guide)
    thresholds = {"row_threshold_ptr": "fp32", "col_threshold_ptr": "fp32" if cols else None}
    return (
        dict(zip(names, labels))
        | (ceilings if case.ceilings else dict.fromkeys(ceilings))
        | guide
        | (thresholds if case.guide else dict.fromkeys(thresholds))
    )


def _pointers_of_moments(case: Case) -> dict[str, str | None]:
    moments = {"row_moments_ptr": "fp32", "col_moments_ptr": "fp32" if case.two_sided else None}
    return moments if case.keeps else dict.fromkeys(moments)


def compile_kept(case: Case) -> Compiled:
    """weigh_kept_kernel for what this case has kept."""
    tile = case.tile.part if isinstance(case.tile, PersistentTile) else case.tile
    names = ("params", "row_normalizer", "row_gain", "factor", "row_partials", "row_moments")
    of_cols = ("col_normalizer", "col_gain", "col_partials", "col_moments")
    pointers: dict[str, str | None] = {f"{name}_ptr": "fp32" for name in (*names, "params_partials", "unusual")}
    pointers |= {f"{name}_ptr": "fp32" if case.two_sided else None for name in of_cols} | {"weights_ptr": case.dtype}
    constants = {
        "TERM": launch.TERMS[case.term], "COL": case.two_sided, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip
    return _compile(
        kept.weigh_kept_kernel,
        case.capability,
        pointers,
        constants,
        {"C", "weights_stride"},
        replace(tile, num_stages=1),
    )


def compile_merge(capability: int, term: str) -> Compiled:
    """merge_kernel with everything it can do for a pair term."""
    names = ("row_state_ptr", "col_state_ptr", "row_partials_ptr", "col_partials_ptr", "params_partials_ptr")
    pointers: dict[str, str | None] = {**dict.fromkeys(names, "fp32"), "dparams_ptr": "fp64"}
    if term == "sigmoid":
        pointers["col_state_ptr"] = pointers["col_partials_ptr"] = None
    constants = {
        "TERM": launch.TERMS[term], "STATE_ROWS": 2 if term == "exponential" else 1,
        "ROW_FRESH": False, "COL_FRESH": False,
        "BLOCK": launch.MERGE_BLOCK, "PARTS": launch.MERGE_PARTS,
    }  # fmt: skip
    return _compile(merge.merge_kernel, capability, pointers, constants, set(), Tile(32, 32, 32, 4, 1))


def _compile(
    kernel: Any,
    capability: int,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    aligned: set[str],
    tile: Tile,
    descriptors: dict[str, str] | None = None,
) -> Compiled:
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if descriptors is not None and name in descriptors:
            signature[name] = descriptors[name]
            continue
        if name in constants or pointers.get(name, "") is None:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name in pointers or name in aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True},
    )
    threads = 32 * tile.num_warps
    usage, instructions = _read_cubin(compiled.asm["cubin"])
    held = tile.block_m * tile.block_n / threads
    stack = usage["STACK"] + usage["LOCAL"]
    return Compiled(
        usage["REG"], stack, compiled.metadata.shared, threads, compiled.asm["ptx"], _after_product(instructions) / held
    )


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """32-bit registers of a thread of a compiled kernel, and bytes that it keeps in memory instead."""
    usage, _ = _read_cubin(compiled.asm["cubin"])
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _read_cubin(cubin: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """What cuobjdump says of a cubin: REG, STACK, LOCAL, ...; and its instructions."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def read(option: str) -> str:
        command = [tools / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", read("-res-usage"))}
        return usage, re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", read("-sass"))


def _after_product(instructions: list[tuple[str, str]]) -> int:
    """Instructions after the last one that multiplies matrices, without the block that leaves pairs out.

    That block is nothing but comparisons and selections; where there are no such instructions, all are counted.
    """
    products = [k for k, (_, text) in enumerate(instructions) if re.search(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)", text)]
    targets = {int(target, 16) for _, text in instructions for target in re.findall(r"BRA.* 0x([0-9a-f]+)", text)}
    blocks: list[list[str]] = [[]]
    for address, text in instructions[products[-1] + 1 if products else 0 :]:
        if int(address, 16) in targets:
            blocks.append([])
        if "NOP" not in text:
            blocks[-1].append(text)
        if re.search(r"\b(BRA|EXIT)\b", text):
            blocks.append([])
    return sum(len(block) for block in blocks if not _leaves_out(block))


def _leaves_out(block: list[str]) -> bool:
    selections = sum(bool(re.search(r"\b(FSEL|ISETP|IADD3|VIADD)\b", text)) for text in block)
    return len(block) > 50 and selections > 0.8 * len(block)


#: Bytes that a persistent tile with weights and statistics of two sides keeps in memory: 48 by Triton 3.6, 128 by 3.9.
#: In four parts there are fewer, for more instructions. Which is faster has not been measured.
_MOST_STACK = {"exponential-weights+statistics-both": 128, "exponential-kept+statistics-both": 64}


def broken(case: Case, made: Compiled) -> str | None:
    """What a case on Hopper's tensor cores breaks of its bounds, or None."""
    persistent_tile = isinstance(case.tile, PersistentTile)
    stack = _MOST_STACK.get(case.name, 0) if persistent_tile else 0
    if made.stack > stack:
        return f"{made.stack} bytes of registers spilled"
    if made.programs(case.capability) < 2:
        return "nobody multiplies while a program finishes its tile"
    if "wgmma.mma_async" not in made.ptx:
        return "not on the tensor cores"
    of_limits = MOST_INSTRUCTIONS_GUIDED if case.guide else MOST_INSTRUCTIONS_CAPPED
    most = (of_limits if case.guide or case.ceilings else MOST_INSTRUCTIONS)[case.name]
    if persistent_tile and not case.ceilings:
        most = MOST_INSTRUCTIONS.get(f"{case.name}-persistent", most)
    return None if made.per_score <= most else f"{made.per_score:.1f} instructions a score, {most} at most"


def check(capability: int) -> int:
    """How many 16-bit cases break their bounds; prints each. In the short form, of those that are seldom, a few."""
    wrong = 0
    seldom = [*kept_cases(capability), *capped_cases(capability), *guided_cases(capability)]
    for case in (*cases(capability), *persistent_cases(capability), *seldom[:: every(4)]):
        if case.dtype == "bf16":
            reason = broken(case, compile_score(case))
            kind = "persistent" if isinstance(case.tile, PersistentTile) else "score"
            print(f"triton {triton.__version__} {case} {kind}: {reason or 'ok'}", flush=True)
            wrong += reason is not None
    return wrong


def table(capability: int) -> Iterator[str]:
    """The rows of a table of what the compiler makes of 16-bit operands."""
    yield "| kernel | tile | registers | programs | instructions per score |"
    yield "|---|---|---|---|---|"
    for case in (*cases(capability), *persistent_cases(capability), *kept_cases(capability)):
        if case.dtype == "bf16":
            made, tile = compile_score(case), case.tile
            shape = f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps"
            if isinstance(tile, PersistentTile):
                shape += f", persistent, in {tile.parts} parts" if tile.parts > 1 else ", persistent"
            programs = made.programs(capability)
            yield f"| {case.name} | {shape} | {made.registers} | {programs} | {made.per_score:.0f} |"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments == ["--check"]:
        sys.exit(check(90) > 0)
    if arguments[:1] == ["--write"]:
        rows = "\n".join(table(90))
        before, rest = NOTEBOOK.read_text().split("<!-- compiled -->")
        after = rest.split("<!-- compiled end -->")[1]
        NOTEBOOK.write_text(
            f"{before}<!-- compiled -->\nTriton {triton.__version__}, sm_90a:\n\n{rows}\n<!-- compiled end -->{after}"
        )
        sys.exit()
    print("triton", triton.__version__)
    for capability in map(int, arguments or ("80", "90", "100")):
        for case in all_cases(capability):
            kinds: list[tuple[str, Callable[[Case], Compiled]]] = [("score", compile_score), ("rest", compile_rest)]
            kinds += [("kept", compile_kept)] * case.keeps
            for kernel, compile_kernel in kinds:
                made = compile_kernel(case)
                product = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in made.ptx), "no mma")
                print(
                    f"{case!s:60} {kernel:5} {made.registers:4} registers {made.programs(capability)} programs "
                    f"{made.stack:5} stack {made.shared:7} shared {made.per_score:5.1f} per score {product}",
                    flush=True,
                )
