#!/usr/bin/env python3
"""Draws docs/images/idea.png: the matrix of logits as the dense formula and as this package holds it.

    python scripts/draw_idea.py

Needs matplotlib (pip install -e '.[bench]').
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PANELS = 4
KEPT, NOW, GONE = "#2980b9", "#e67e22", "0.93"


def block(axes: Axes, x: float, y: float, width: float, height: float, color: str, edge: str = "white") -> None:
    """A filled rectangle; y counts downwards, as rows do."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=1.2))


def label(axes: Axes, x: float, y: float, text: str, size: float = 8.5, **more: object) -> None:
    """Centred text."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, **more)  # type: ignore[arg-type]


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="0.3", linewidth=1.1))


def features(axes: Axes) -> None:
    """x [N, D] at the left, y [M, D] on top."""
    block(axes, -1.0, 0, 0.55, PANELS, KEPT)
    block(axes, 0, -1.0, PANELS, 0.55, KEPT)
    label(axes, -0.725, PANELS / 2, "x", color="white", weight="bold")
    label(axes, PANELS / 2, -0.725, "y", color="white", weight="bold")


def dense(axes: Axes) -> None:
    """All logits, several times over."""
    features(axes)
    for shift in (0.3, 0.15, 0.0):
        block(axes, shift, shift, PANELS, PANELS, KEPT, "white")
    label(axes, PANELS / 2, PANELS / 2, "logits [N, M]\nsoftmax [N, M]\ntheir gradient [N, M]", 9.5, color="white")
    axes.set_title("dense formula: O(N M) memory", fontsize=10)


def panels(axes: Axes, row: int, column: int) -> None:
    """The matrix in panels, one of which is there."""
    features(axes)
    for i in range(PANELS):
        for j in range(PANELS):
            block(axes, j, i, 1, 1, NOW if (i, j) == (row, column) else GONE)


def statistics(axes: Axes) -> None:
    """Value: each panel becomes a part of the log-sum-exps."""
    panels(axes, 1, 2)
    block(axes, PANELS + 0.35, 0, 0.3, PANELS, KEPT)
    block(axes, 0, PANELS + 0.35, PANELS, 0.3, KEPT)
    arrow(axes, (3.0, 1.5), (PANELS + 0.4, 1.5))
    arrow(axes, (2.5, 2.0), (2.5, PANELS + 0.4))
    label(axes, PANELS + 0.95, PANELS / 2, "log-sum-exp [N]", rotation=90)
    label(axes, PANELS / 2, PANELS + 1.0, "log-sum-exp [M]")
    label(axes, 2.5, 1.5, "scores")
    axes.set_title("first pass: statistics, O(N + M)", fontsize=10)


def gradients(axes: Axes) -> None:
    """Gradients: each panel is made again, becomes weights, and is multiplied with the features."""
    panels(axes, 2, 1)
    block(axes, PANELS + 0.35, 0, 0.55, PANELS, KEPT)
    block(axes, 0, PANELS + 0.35, PANELS, 0.55, KEPT)
    arrow(axes, (2.0, 2.5), (PANELS + 0.4, 2.5))
    arrow(axes, (1.5, 3.0), (1.5, PANELS + 0.4))
    label(axes, PANELS + 0.62, PANELS / 2, "dx", color="white", weight="bold")
    label(axes, PANELS / 2, PANELS + 0.62, "dy", color="white", weight="bold")
    label(axes, 1.5, 2.5, "weights")
    label(axes, 3.0, 2.28, "· y", 8.0)
    label(axes, 1.85, 3.4, "ᵀ· x", 8.0)
    axes.set_title("second pass: gradients, O((N + M) D)", fontsize=10)


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (dense, statistics, gradients), strict=True):
        axes.set_xlim(-1.2, PANELS + 1.3)
        axes.set_ylim(PANELS + 1.3, -1.2)
        axes.set_aspect("equal")
        axes.axis("off")
        draw(axes)
    legend = ((KEPT, "kept in memory", 0.34), (NOW, "in the workspace now", 0.48), (GONE, "not there", 0.66))
    for color, text, place in legend:
        figure.text(place, 0.03, "■ ", color=color, fontsize=12, ha="right", va="center")
        figure.text(place, 0.03, text, fontsize=9, va="center")
    path = Path(__file__).resolve().parents[1] / "docs/images/idea.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
