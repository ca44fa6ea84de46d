"""Pictures: time and peak memory against the batch size, log-log, forward beside forward + backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import MODES
from .report import provider_name
from .results import Row

__all__ = ["plot", "plot_ratios"]

#: One figure per value of these.
FIGURE = ("loss", "d", "dtype", "device", "learnable_scale", "frozen_y")
OURS = ("#c0392b", "#e67e22", "#8e44ad", "#2980b9")
PEERS = ("0.25", "0.45", "0.6", "0.35", "0.5", "0.7", "0.55")
MARKERS = "svD^<>pX"


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes time_*.png and memory_*.png for every loss measured at three batch sizes or more; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[tuple[Any, ...], list[Row]] = {}
    for row in _latest(rows):
        figures.setdefault(tuple(row[name] for name in FIGURE), []).append(row)
    written = []
    for group in figures.values():
        for what, field, scale in (("time", "best_s", 1e3), ("memory", "peak_bytes", 1e-6)):
            curves = _curves(group, field, scale)
            if any(len(points) > 2 for points in curves.values()):
                written.append(_draw(what, group, curves, folder))
    return written


def _latest(rows: Iterable[Row]) -> list[Row]:
    """Rows that are right, the newest of each provider and case, of the machine and threads measured last."""
    newest: dict[tuple[Any, ...], Row] = {}
    by_date = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["date"])
    place = {row["device"]: (row["machine"], row["threads"]) for row in by_date}
    for row in by_date:
        if place[row["device"]] != (row["machine"], row["threads"]):
            continue
        key = (*(row[name] for name in FIGURE), row["mode"], row["n"], row["m"], provider_name(row))
        newest[key] = {**newest.get(key, {}), **row}
    return list(newest.values())


def _curves(rows: list[Row], field: str, scale: float) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(mode, provider) -> points; the GEMM floor counts as a provider of times."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if field in row:
            curves.setdefault((row["mode"], provider_name(row)), {})[row["n"]] = row[field] * scale
        if field == "best_s" and "floor_s" in row:
            points = curves.setdefault((row["mode"], "GEMM floor"), {})
            points[row["n"]] = min(points.get(row["n"], float("inf")), row["floor_s"] * scale)
    return {key: sorted(points.items()) for key, points in curves.items()}


def _draw(what: str, rows: list[Row], curves: dict[tuple[str, str], list[tuple[int, float]]], folder: Path) -> Path:
    from matplotlib.figure import Figure

    modes = [mode for mode in MODES if any(key[0] == mode for key in curves)]
    names = sorted({name for _, name in curves}, key=lambda name: (not name.startswith("ours"), name))
    figure = Figure(figsize=(5.2 * len(modes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for name in names:
            points = curves.get((mode, name))
            if points:
                panel.plot(*zip(*points, strict=True), label=name, **_style(name, names))
        sizes = sorted({n for (m, _), points in curves.items() if m == mode for n, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        panel.set_xticks(sizes, [f"{n:,}" for n in sizes])
        panel.minorticks_off()
        panel.set_xlabel("batch size N")
        panel.set_title({"fwd": "forward", "fwd+bwd": "forward + backward"}[mode], fontsize=10)
        panel.grid(True, which="major", color="0.92", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(length=0)
    panels[0].set_ylabel("milliseconds" if what == "time" else "peak MB beyond inputs and gradients")
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5)
    first = rows[0]
    setting = f"{first['loss']}, D = {first['d']}, {first['dtype']}"
    figure.suptitle(f"{setting}\n{first['machine']}, threads: {first['threads']}", fontsize=9)
    scale = "" if first["learnable_scale"] else "_fixed_scale"
    frozen = "_frozen" if first["frozen_y"] else ""
    path = folder / f"{what}_{first['loss']}_d{first['d']}_{first['dtype']}_{first['device']}{scale}{frozen}.png"
    figure.savefig(path, dpi=150)
    return path


def _style(name: str, names: list[str]) -> dict[str, Any]:
    """Ours in colour and on top, peers in greys, the floor dashed."""
    if name == "GEMM floor":
        return {"color": "black", "linestyle": "--", "linewidth": 1.2, "zorder": 2}
    ours = [other for other in names if other.startswith("ours")]
    if name in ours:
        return {"color": OURS[ours.index(name) % len(OURS)], "marker": "o", "linewidth": 2.4, "zorder": 4}
    peers = [other for other in names if other not in ours and other != "GEMM floor"]
    k = peers.index(name)
    return {"color": PEERS[k % len(PEERS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 4.5, "linewidth": 1.2}


def plot_ratios(ratios: Sequence[tuple[str, float]], where: str, path: Path) -> Path:
    """How many times as fast each is, on one logarithmic axis; writes the picture and returns its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 0.6 + 0.24 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    places = range(len(ratios), 0, -1)
    axes.hlines(places, 1.0, [ratio for _, ratio in ratios], color="0.85", linewidth=3)
    axes.plot([ratio for _, ratio in ratios], places, "o", color=OURS[0])
    for place, (_, ratio) in zip(places, ratios, strict=True):
        axes.annotate(f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x", (ratio, place), (7, -3),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min([0.8, *(0.8 * ratio for _, ratio in ratios)]), 2 * max([1.0, *(ratio for _, ratio in ratios)]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(places, [name for name, _ in ratios], fontsize=8)
    axes.set_xlabel("times as fast as the library's own loss", fontsize=9)
    axes.set_title(where, fontsize=8, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
