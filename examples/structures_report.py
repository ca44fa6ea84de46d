"""The table and the picture of ``structures.py``: means over seeds, intervals, differences to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from files import write_figure
from rich.console import Console
from rich.table import Table

__all__ = ["COLUMNS", "draw_report", "interval", "print_report"]

Result = dict[str, Any]
Read = Callable[[Result], float | None]
# Student's t, 97.5 %, by degrees of freedom; more are treated as normal
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def _at(*keys: str) -> Read:
    """A number somewhere in a result, or None where that model has none."""

    def read(result: Result) -> float | None:
        value: Any = result
        for key in keys:
            if key not in value:
                return None
            value = value[key]
        return float(value)

    return read


# {model: {table: {column: where its number is}}}; shares of 1 except the gap
COLUMNS: dict[str, dict[str, dict[str, Read]]] = {
    "towers": {
        "zero-shot, balanced accuracy": {
            **{f"script top-{k}": _at("zero-shot", "script", str(k)) for k in (1, 3, 5)},
            **{f"category top-{k}": _at("zero-shot", "category", str(k)) for k in (1, 3, 5)},
            "shift: known faces": _at("shift", "known faces", "1"),
            "shift: new faces": _at("shift", "new faces", "1"),
        },
        "linear probes, balanced accuracy": {
            **{f"script {k}-shot": _at("few-shot", "script", str(k)) for k in (1, 5, 20)},
            **{f"category {k}-shot": _at("few-shot", "category", str(k)) for k in (1, 5, 20)},
            "face, shared": _at("face", "shared", "mean"),
        },
        "face of letters, balanced accuracy": {
            f"{title}, {kind}": _at("face", kind, name)
            for title, name in (
                ("attributes", "mean"),
                ("5-shot", "which, 5 shots"),
                ("20-shot", "which, 20 shots"),
                ("all shots", "which"),
                ("nearest", "nearest"),
            )
            for kind in ("shared", "independent")
        },
        "retrieval": {
            **{f"image to text R@{k}": _at("retrieval", f"image to text R@{k}") for k in (1, 5, 10)},
            **{f"text to image R@{k}": _at("retrieval", f"text to image R@{k}") for k in (1, 5, 10)},
            "gap of the clouds": _at("gap"),
        },
    },
    "fusion": {
        "fusion tasks, accuracy": {
            **{name: _at("questions", name, "accuracy") for name in ("script", "face", "marks", "pairs", "entailment")},
            "image to text R@1": _at("retrieval", "image to text R@1"),
            "text to image R@1": _at("retrieval", "text to image R@1"),
        }
    },
}
AVERAGED = ("zero-shot, balanced accuracy", "linear probes, balanced accuracy")  # as the claim is put


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t); NaN for a single one."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return mean, math.nan
    return mean, _T.get(count - 1, 1.96) * float(np.std(values, ddof=1)) / math.sqrt(count)


def by_seed(results: Sequence[Result], variant: str, read: Read) -> dict[int, float]:
    """{seed: the column's number}, of one model's results."""
    found = {}
    for result in results:
        if result["cell"]["variant"] == variant:
            value = read(result)
            if value is not None:
                found[int(result["cell"]["seed"])] = value
    return found


def average(*tables: dict[str, Read]) -> Read:
    """The mean of the tables, each the mean of its columns."""

    def read(result: Result) -> float | None:
        means = []
        for columns in tables:
            values = [column(result) for column in columns.values()]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                return None
            means.append(np.mean(known))
        return float(np.mean(means))

    return read


def _shown(values: dict[int, float], percent: bool, sign: str = "") -> str:
    if not values:
        return "-"
    mean, half = interval(list(values.values()))
    unit, digits = (100.0, 1) if percent else (1.0, 2)
    text = f"{mean * unit:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half * unit:.{digits}f}"


def variants_of(results: Sequence[Result]) -> list[str]:
    """In the order of the results."""
    return list(dict.fromkeys(result["cell"]["variant"] for result in results))


def print_report(console: Console, results: Sequence[Result]) -> None:
    """Every table: a row per column of numbers, a column per variant; then what each variant adds to the base."""
    for model, tables in COLUMNS.items():
        own = [result for result in results if result["cell"]["model"] == model]
        if not own:
            continue
        for name, columns in tables.items():
            mean = average(columns) if name in AVERAGED or model == "fusion" else None
            console.print(_table(own, f"{model}: {name}, %, mean ± 95 % interval", columns, mean))
        averaged = [columns for name, columns in tables.items() if name in AVERAGED]
        if averaged:
            console.print(_table(own, f"{model}: zero-shot and probes, %", {}, average(*averaged)))
        seeds = sorted({result["cell"]["seed"] for result in own})
        console.print(f"Seeds {', '.join(map(str, seeds))}. {_chances(own)}\n", highlight=False)


def _table(results: Sequence[Result], title: str, columns: dict[str, Read], mean: Read | None) -> Table:
    """One model's numbers; ``mean`` has its own rows at the end."""
    variants = variants_of(results)
    table = Table("", *variants, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, read in {**columns, **({"average": mean} if mean else {})}.items():
        values = [by_seed(results, variant, read) for variant in variants]
        table.add_row(name, *(_shown(v, name != "gap of the clouds") for v in values))
    if mean and "base" in variants:
        base = by_seed(results, "base", mean)
        table.add_section()
        table.add_row("average, less base's", *(_difference(results, v, mean, base) for v in variants))
    return table


def _difference(results: Sequence[Result], variant: str, read: Read, base: dict[int, float]) -> str:
    """Paired by seed: the same first weights as far as both have them, the same batches, the same questions."""
    values = by_seed(results, variant, read)
    paired = {seed: values[seed] - base[seed] for seed in values if seed in base}
    return "" if variant == "base" else _shown(paired, True, "+")


def _chances(results: Sequence[Result]) -> str:
    """What guessing reaches."""
    first = results[0]
    if "questions" in first:
        parts = [f"{name} {value['by chance']:.1%}" for name, value in first["questions"].items()]
    else:
        parts = [f"{name} {1 / count:.1%} (top-1)" for name, count in first["classes"].items()]
        parts += ["attributes of a face 50.0%", f"face {first['face']['shared']['by chance']:.1%}"]
    return "By chance: " + ", ".join(parts) + "."


def draw_report(path: Path, results: Sequence[Result]) -> None:
    """The towers' clouds in two dimensions, a panel per variant; below, what shared and independent features know."""
    from matplotlib.figure import Figure

    towers = [result for result in results if result["cell"]["model"] == "towers"]
    variants = variants_of(towers)
    figure = Figure(figsize=(3 * max(3, len(variants)), 6.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    upper, lower = parts
    for axes, variant in zip(upper.subplots(1, max(1, len(variants)), squeeze=False)[0], variants):
        result = next(result for result in towers if result["cell"]["variant"] == variant)
        for name, color in (("image", "tab:blue"), ("text", "tab:orange")):
            points = np.array(result["clouds"][name])
            axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.5, color=color, label=name)
        axes.set(
            title=f"{variant}\ngap {result['gap']:.2f}", xlabel="along the gap", xticks=[], yticks=[], aspect="equal"
        )
    if variants:
        upper.axes[0].legend(fontsize=7)
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.4))
    for i, (kind, color) in enumerate((("shared", "tab:blue"), ("independent", "tab:green"))):
        _bars(left, towers, variants, {kind: _at("face", kind, "nearest")}, color, i, 2)
    if towers:
        left.axhline(100 * towers[0]["face"]["shared"]["by chance"], color="black", lw=0.8, ls=":")
    left.set(title="the nearest picture of another letter has the same face", ylabel="%")
    fusion = [result for result in results if result["cell"]["model"] == "fusion"]
    asked = variants_of(fusion)
    columns = COLUMNS["fusion"]["fusion tasks, accuracy"]
    for i, (name, read) in enumerate(columns.items()):
        _bars(right, fusion, asked, {name: read}, f"C{i}", i, len(columns))
    right.set(title="fusion model", ylabel="accuracy, %")
    for axes in (left, right):
        axes.set_visible(bool(axes.containers))  # a panel without results is not shown
        axes.grid(axis="y", alpha=0.3)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room above the bars
            axes.legend(fontsize=7, loc="upper left", ncols=len(labels), columnspacing=1, handlelength=1)
    write_figure(path, figure, dpi=130)


def _bars(
    axes: Any, results: Sequence[Result], variants: Sequence[str],
    column: dict[str, Read], color: str, place: int, places: int,
) -> None:  # fmt: skip
    """One group of bars, a bar per variant, with intervals."""
    ((name, read),) = column.items()
    width = 0.8 / places
    for i, variant in enumerate(variants):
        values = list(by_seed(results, variant, read).values())
        if values:
            mean, half = interval(values)
            label = name if not any(bar.get_label() == name for bar in axes.containers) else None
            axes.bar(i + (place - (places - 1) / 2) * width, 100 * mean, width, color=color, label=label,
                     yerr=None if math.isnan(half) else 100 * half)  # fmt: skip
    axes.set_xticks(range(len(variants)), variants, fontsize=8)
