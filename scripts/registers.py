"""Registers and spills of the CUDA kernels on Hopper, from what ptxas -v says of them.

python scripts/registers.py LOG     ends with an error where a kernel needs too many, or where the log has none
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ARCH = "90"
#: Registers of a thread at two blocks of 256 threads on a multiprocessor.
MOST_REGISTERS = 128
#: Bytes stored and loaded: an address or two that is put aside, not what is in the loops.
MOST_SPILLED = 64
KERNELS = ("panel_pass_kernel", "tensor_core_kernel", "merge_kernel")


def read(text: str) -> dict[str, tuple[int, int]]:
    """{kernel: (registers, bytes spilled)} of the architecture's kernels, by their demangled names."""
    demangled = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in demangled.split("Compiling entry function '")[1:]:
        name, _, rest = part.partition("' for '")
        registers = re.search(r"Used (\d+) registers", rest)
        if rest.startswith(f"sm_{ARCH}'") and registers is not None:
            found[name] = (int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes spill", rest))))
    return found


def wrong(text: str) -> list[str]:
    """What is missing from ptxas's words, or over a bound in them."""
    kernels = read(text)
    names = " ".join(kernels)
    bad = [f"no {name} for sm_{ARCH}" for name in KERNELS if name not in names]
    bad += [f"{name}: {used} registers" for name, (used, _) in kernels.items() if used > MOST_REGISTERS]
    return bad + [
        f"{name}: {spilled} bytes spilled" for name, (_, spilled) in kernels.items() if spilled > MOST_SPILLED
    ]


if __name__ == "__main__":
    log = Path(sys.argv[1]).read_text()
    if bad := wrong(log):
        raise SystemExit("\n".join(bad))
    used = read(log).values()
    print(
        f"{len(used)} kernels for sm_{ARCH}: at most {max(r for r, _ in used)} registers, {max(s for _, s in used)} "
        "bytes spilled"
    )
