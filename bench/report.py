"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from .cases import Case
from .goals import Goal
from .providers import Provider
from .results import Row, case_of

__all__ = ["case_tables", "goal_table", "milliseconds", "plan_table", "provider_table"]


def milliseconds(seconds: float | None) -> str:
    """Three digits, in ms."""
    if seconds is None:
        return "-"
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: int | None) -> str:
    """In MB of 10^6 bytes."""
    if count is None:
        return "-"
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.1f}"


def provider_name(row: Row) -> str:
    """As on the command line."""
    return f"{row['provider']}-{row['backend']}" if row["backend"] else str(row["provider"])


def case_tables(rows: Iterable[Row]) -> list[Table]:
    """One table per case: times, fraction of the GEMM floor, speed against dense, peak memory."""
    by_case: dict[Case, list[Row]] = {}
    for row in rows:
        by_case.setdefault(case_of(row), []).append(row)
    return [_case_table(case, group) for case, group in by_case.items()]


def _case_table(case: Case, rows: list[Row]) -> Table:
    table = Table(
        title=case.title, title_justify="left", title_style="bold", caption=_floor(rows), caption_justify="left"
    )
    table.add_column("provider")
    for name in ("best ms", "median ms", "of floor", "vs dense", "peak MB"):
        table.add_column(name, justify="right")
    table.add_column("largest error, or why there is no figure")
    dense = next((row.get("best_s") for row in rows if provider_name(row) == "dense"), None)
    for row in rows:
        if row["status"] != "ok":
            table.add_row(provider_name(row), *["-"] * 5, f"{row['status']}: {row['reason']}", style="red")
            continue
        best = row.get("best_s")
        fraction = row.get("floor_ratio")
        table.add_row(
            provider_name(row),
            milliseconds(best),
            milliseconds(row.get("median_s")),
            f"{fraction:.2f}" if fraction else "-",
            f"{dense / best:.2f}x" if dense and best else "-",
            megabytes(row.get("peak_bytes")),
            _error(row),
            style="bold green" if row["backend"] else "",
        )
    return table


def _error(row: Row) -> str:
    if "error" not in row:
        return ""
    right = row["error"] <= row["tolerance"]
    return f"{row['error']:.0e} <= {row['tolerance']:.0e}" if right else f"{row['error']:.0e}, by rounded logits"


def _floor(rows: list[Row]) -> str | None:
    timed = next((row for row in rows if "floor_s" in row), None)
    if timed is None:
        return None
    case, count = case_of(timed), timed["floor_products"]
    rate = count * case.flop / timed["floor_s"] / 1e9
    tile = " x ".join(f"{side:,}" for side in timed["floor_tile"])
    return (
        f"GEMM floor: {count:g} products of {case.flop / 1e9:,.3g} Gflop in tiles of {tile}: "
        f"{milliseconds(timed['floor_s'])} ms at {rate:,.0f} Gflop/s; best of {timed['rounds']} rounds in turns"
    )


def goal_table(results: Iterable[tuple[Goal, float | None, str]], dtype: str = "fp32") -> Table:
    """Each goal with its bound, the figure and whether it is met."""
    title = f"Goals: {dtype}, forward + backward, learnable scale"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("goal")
    table.add_column("bound", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    for goal, figure, verdict in results:
        sign = "<=" if goal.at_most else ">="
        measured = "-" if figure is None else f"{figure:.3g}"
        style = "green" if verdict == "met" else "red" if verdict == "not met" else "yellow"
        table.add_row(goal.text, f"{sign} {goal.target:g} {goal.unit}", measured, verdict, style=style)
    return table


def provider_table(providers: Iterable[Provider]) -> Table:
    """Who there is, with version or the reason of absence."""
    table = Table(title="Providers", title_justify="left", title_style="bold")
    for name in ("provider", "version", "losses", "devices", "gradient of the scale", "here"):
        table.add_column(name)
    for p in providers:
        here = p.why_absent() or "yes"
        table.add_row(
            p.name,
            f"{p.package} {p.version or ''}",
            ", ".join(sorted(p.losses)),
            ", ".join(p.devices),
            "yes" if p.learnable_scale else "no",
            here,
        )
    return table


def plan_table(title: str, lines: Iterable[tuple[Case, Provider, str | None]]) -> Table:
    """What would run, and why the rest would not."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("case")
    table.add_column("provider")
    table.add_column("")
    last = None
    for case, provider, reason in lines:
        table.add_row(
            "" if case == last else case.title, provider.name, reason or "runs", style="" if reason is None else "dim"
        )
        last = case
    return table
