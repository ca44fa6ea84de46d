"""What rounded exponentials do to gradients, by the rule of tolerance.py: a simulation in float64.

    python tests/exponentials.py [--write]     prints the table, or writes it into docs/performance.md

A pass that finds the statistics can leave each score's exponential, relative to the largest score of its tile, in the
16 bits that the weight of this pair will have: the weight is then the exponential times a factor of its row, rounded
once more, and the scores need no second product. Here everything is float64 but these two roundings and that of the
results. The sums of exponentials are taken before they are rounded, so the value has no part in it.

"Once" is the weight as it is rounded without that, "twice" with it; both as parts of the error that the rule allows:
its floor, without what float32 torch's own errors add to it. dscale is the sum of weight * (score - center): of the
exponentials as they are rounded, or of sums that the pass over the statistics takes of each row of a tile, unrounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["NOTEBOOK", "parts_of_the_rule", "table"]

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/performance.md"
FIRST, LAST = "<!-- exponentials -->\n", "<!-- exponentials end -->\n"
#: Rows of the matrix; each is a sum over all columns. Features, and columns of a tile that has one shift.
ROWS, FEATURES, TILE = 256, 64, (128, 64)
COLUMNS, TEMPERATURES = (1024, 4096, 16384, 65536), (0.07, 0.01)
#: Units of the rule: of a result's rounding, and of the logits'.
UNITS, LOGIT_UNITS = 8, 4


def _rounded(values: Tensor) -> Tensor:
    """To the nearest bfloat16, in float64; through float32, as the kernels have them."""
    return values.float().bfloat16().double()


def _tiles(scores: Tensor) -> Tensor:
    """A matrix [R, C] as [R / rows, C / columns, rows, columns] of its tiles."""
    (n, m), (rows, cols) = scores.shape, TILE
    return scores.view(n // rows, rows, m // cols, cols).transpose(1, 2)


def _whole(tiles: Tensor) -> Tensor:
    """The matrix of these tiles."""
    a, b, rows, cols = tiles.shape
    return tiles.transpose(1, 2).reshape(a * rows, b * cols)


def parts_of_the_rule(cols: int, temperature: float, seed: int = 0) -> dict[str, float]:
    """The largest errors of InfoNCE's gradients, as parts of what the rule's floor allows."""
    g, scale = torch.Generator().manual_seed(seed), 1 / temperature
    y = _rounded(normalize(torch.randn(cols, FEATURES, generator=g, dtype=torch.float64)))
    noise = torch.randn(ROWS, FEATURES, generator=g, dtype=torch.float64) / FEATURES**0.5
    x = _rounded(normalize(y[:ROWS] + noise))
    scores = x @ y.T
    center = scores.diagonal().mean()
    z = scale * scores
    w = torch.softmax(z, 1).fill_diagonal_(0.0) / ROWS  # the negatives' weights
    tiles = _tiles(z)
    shift = tiles.amax((2, 3), keepdim=True)
    factors = _whole(torch.exp(shift - _tiles(torch.logsumexp(z, 1)[:, None].expand_as(z))) / ROWS)
    exponentials = _rounded(_whole(torch.exp(tiles - shift))).fill_diagonal_(0.0)
    once, twice = _rounded(w), _rounded(exponentials * factors)
    eps, eps32 = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    sizes = w.clone()  # |dL/dz|, the positives' too
    sizes.diagonal().copy_(w.sum(1))
    logits = LOGIT_UNITS * eps32 * scale * x.norm(dim=1)[:, None] * y.norm(dim=1)

    def floor(size: float) -> Tensor:
        return sizes * (UNITS * size + logits)

    def error(made: Tensor, of: Tensor, allowed: Tensor) -> float:
        return float(((_rounded(made) - of).abs() / allowed[:, None]).max())

    found = {}
    positives = -w.sum(1)
    dx, dy = scale * (w @ y + positives[:, None] * y[:ROWS]), scale * w.T @ x
    dy[:ROWS] += scale * positives[:, None] * x
    of_x, of_y = (scale * v.abs().max() * floor(eps).sum(k) for v, k in ((y, 1), (x, 0)))
    for name, made in (("once", once), ("twice", twice)):
        found[f"dx, {name}"] = error(dx + scale * (made - w) @ y, dx, of_x)
        found[f"dy, {name}"] = error(dy + scale * (made - w).T @ x, dy, of_y)
    centered = (scores - scores.mean()).abs()
    rounding = sizes * LOGIT_UNITS * eps32 * x.norm(dim=1)[:, None] * y.norm(dim=1)
    allowed = torch.minimum((floor(eps32) * scores.abs()).sum(), (floor(eps32) * centered + rounding).sum())
    of_exponentials = ((exponentials * factors - w) * (scores - center)).sum().abs()
    moments = (_tiles(torch.exp(z - _whole(shift.expand_as(tiles))).fill_diagonal_(0.0) * (scores - center))).sum(3)
    of_moments = (moments.float().double() * _tiles(factors)[..., 0]).sum() - (w * (scores - center)).sum()
    found["dscale, of exponentials"] = float(of_exponentials / allowed)
    found["dscale, of sums"] = float(of_moments.abs() / allowed)
    return found


def table() -> Iterator[str]:
    """Rows by columns and temperature."""
    names: list[str] = []
    for temperature in TEMPERATURES:
        for cols in COLUMNS:
            found = parts_of_the_rule(cols, temperature)
            if not names:
                names = [*found]
                yield f"| columns | temperature | {' | '.join(names)} |"
                yield "|---" * (2 + len(names)) + "|"
            yield f"| {cols:,} | {temperature} | {' | '.join(f'{found[name]:.2g}' for name in names)} |"


if __name__ == "__main__":
    lines = "\n".join(table()) + "\n"
    if sys.argv[1:] == ["--write"]:
        before, rest = NOTEBOOK.read_text().split(FIRST)
        NOTEBOOK.write_text(before + FIRST + lines + LAST + rest.split(LAST)[1])
    else:
        print(lines, end="")
