"""The table of docs/distributed.md, from the plan: ``python tests/distributed/table.py`` writes it anew."""

from __future__ import annotations

from pathlib import Path

import torch

import contrastive_kernels as ck

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
BEGIN, END = "<!-- table: python tests/distributed/table.py -->", "<!-- end of the table -->"

#: Ranks, rows of the global batch, features, GB/s that a rank receives: NVLink within a machine of 8, a network of
#: 400 Gbit/s a GPU beyond.
CASES = ((8, 65_536, 768, 400), (64, 262_144, 1024, 50), (256, 1_048_576, 1024, 50), (1024, 1_048_576, 1024, 50))


def table() -> str:
    """Every case, for the grid and for the ring."""
    lines = [
        "| GPUs | rows | D | strategy | received | of a gather of both sides | products | communication | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, n, d, links in CASES:
        for strategy in ("grid", "ring"):
            p = ck.plan(
                n, None, d, torch.bfloat16, "cuda", capability=90, world=ranks, links=links, strategy=strategy
            ).over_ranks
            assert p is not None and p.products_seconds is not None and p.communication_seconds is not None
            gather = 2 * (ranks - 1) * (n // ranks) * d * (2 + 4)  # x and y in bfloat16, their gradients in float32
            shape = f"grid {p.shape[0]} x {p.shape[1]}" if strategy == "grid" else "ring"
            lines.append(
                f"| {ranks:,} | {n:,} | {d:,} | {shape} | {p.bytes / 1e9:.3g} GB | {p.bytes / gather:.2f} | "
                f"{1e3 * p.products_seconds:.3g} ms | {1e3 * p.communication_seconds:.3g} ms | "
                f"{p.gathered_bytes / 1e9:.3g} GB |"
            )
    return "\n".join(lines)


def page_with(text: str, table: str) -> str:
    """The page with this table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(), table()))
