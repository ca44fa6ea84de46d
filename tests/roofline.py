"""The table of docs/roofline.md, from the package's own counts.

python tests/roofline.py     writes it
"""

from __future__ import annotations

from pathlib import Path

import torch

import contrastive_kernels as ck

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/roofline.md"
FIRST, LAST = "<!-- table -->\n", "<!-- end -->\n"
#: NVIDIA's data sheet of an H100 SXM: flop/s of dense bfloat16 products, bytes/s.
FLOPS, BANDWIDTH = 989e12, 3.35e12
N = 65536


def table() -> str:
    """One row per loss, D and pass."""
    lines = [
        "| loss | D | pass | panels | products | Tflop | GB | launches | limit, ms | bytes' share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loss in ("clip_loss", "nt_xent", "sigmoid"):
        for features in (256, 512, 1024):
            n = N // 2 if loss == "nt_xent" else N
            plan = ck.plan(
                n, d=features, dtype=torch.bfloat16, device="cuda", loss=loss, backend="triton", capability=90
            )
            for each in plan.passes:
                products, memory = each.flop / FLOPS, each.bytes / BANDWIDTH
                rows, cols = each.panel
                lines.append(
                    f"| {loss} | {features} | {each.name} | {each.panels} of {rows:,} x {cols:,} | {each.products:g} "
                    f"| {each.flop / 1e12:.2f} | {each.bytes / 1e9:.1f} | {each.launches} "
                    f"| {1e3 * max(products, memory):.2f} | {memory / products:.0%} |"
                )
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, rest = text.split(FIRST)
    inside, after = rest.split(LAST)
    return before + FIRST, inside, LAST + after


if __name__ == "__main__":
    before, _, after = split(DOCUMENT.read_text())
    DOCUMENT.write_text(before + table() + after)
