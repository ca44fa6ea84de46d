"""The table of docs/roofline.md and the predictions of docs/performance.md, from the package's own counts.

python tests/roofline.py     writes them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import contrastive_kernels as ck
from contrastive_kernels.planning.plan import Pass

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/roofline.md"
NOTEBOOK = DOCUMENT.with_name("performance.md")
FIRST, LAST = "<!-- table -->\n", "<!-- end -->\n"
#: NVIDIA's data sheet of an H100 SXM: flop/s of dense bfloat16 products, bytes/s.
FLOPS, BANDWIDTH = 989e12, 3.35e12
#: The same of an H200, which has an H100's multiprocessors.
NOTEBOOK_FLOPS, NOTEBOOK_BANDWIDTH = 989e12, 4.8e12
N = 65536


def passes(losses: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, int, Pass]]:
    """(loss, D, pass) of the plan for N x N scores of bfloat16 features on an H100 or H200."""
    for loss in losses:
        n = N // 2 if loss == "nt_xent" else N
        for d in widths:
            plan = ck.plan(n, d=d, dtype=torch.bfloat16, device="cuda", loss=loss, backend="triton", capability=90)
            for each in plan.passes:
                yield loss, d, each


def table() -> str:
    """One row per loss, D and pass."""
    lines = [
        "| loss | D | pass | panels | products | Tflop | GB | launches | limit, ms | bytes' share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, features, each in passes(("clip_loss", "info_nce", "nt_xent", "sigmoid"), (256, 512, 1024)):
        products, memory = each.flop / FLOPS, each.bytes / BANDWIDTH
        rows, cols = each.panel
        lines.append(
            f"| {loss} | {features} | {each.name} | {each.panels} of {rows:,} x {cols:,} | {each.products:g} "
            f"| {each.flop / 1e12:.2f} | {each.bytes / 1e9:.1f} | {each.launches} "
            f"| {1e3 * max(products, memory):.2f} | {memory / products:.0%} |"
        )
    return "\n".join(lines) + "\n"


def panels() -> str:
    """One panel's flop and bytes over the rates of an H200's data sheet, and the limit of the whole pass."""
    lines = [
        "| loss | D | pass | panel | Gflop | at 989 Tflop/s, us | MB | at 4.8 TB/s, us | panels | limit of all, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, features, each in passes(("clip_loss", "info_nce", "sigmoid"), (256, 512, 768, 1024)):
        flop, size = each.flop / each.panels, each.bytes / each.panels
        products, memory = flop / NOTEBOOK_FLOPS, size / NOTEBOOK_BANDWIDTH
        rows, cols = each.panel
        lines.append(
            f"| {loss} | {features} | {each.name} | {rows:,} x {cols:,} "
            f"| {flop / 1e9:.1f} | {1e6 * products:.0f} | {size / 1e6:.0f} | {1e6 * memory:.0f} "
            f"| {each.panels} | {1e3 * each.panels * max(products, memory):.1f} |"
        )
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, rest = text.split(FIRST)
    inside, after = rest.split(LAST)
    return before + FIRST, inside, LAST + after


if __name__ == "__main__":
    for document, lines in ((DOCUMENT, table()), (NOTEBOOK, panels())):
        before, _, after = split(document.read_text())
        document.write_text(before + lines + after)
