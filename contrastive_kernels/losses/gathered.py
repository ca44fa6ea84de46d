"""What of a loss over the ranks of a group is no sum over a rank's own rows: every rank computes that of all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..arguments.checks import (
    check_engine,
    check_features,
    check_flag,
    check_pair,
    check_positives,
    check_reduction,
    check_scale,
    check_several_positives,
    check_vector,
    is_number,
    shown,
)
from ..arguments.margin import check_margin_of_loss
from ..arguments.pairs import check_ids, check_labels, check_smoothing
from ..arguments.reduction import row_weights
from ..distributed.group import Ranks, told
from ..distributed.whole import OfRank, whole_over_ranks
from ..engine.matrix import Problem
from ..engine.strategy import require_panel
from .composed import check_corrections
from .guide import check_guide, check_guided_margin
from .queue import FeatureQueue, check_queue
from .scales import check_scales_of_both, is_by_row

__all__ = [
    "check_candidates",
    "check_variant",
    "gathered_labels",
    "gathered_loss",
    "gathered_ranking",
    "require_gathering",
    "wants_all",
]

#: Options that print alike where they are alike.
_PRINTED = (
    "include_positive",
    "label_smoothing",
    "margin",
    "guided_margin",
    "reduction",
    "normalize",
    "debiased",
    "hardness_beta",
    "variant",
    "return_metrics",
)


def require_gathering(ranks: Ranks, name: str) -> None:
    """A strategy by which every rank has all rows."""
    if ranks.strategy not in ("auto", "replicated"):
        raise NotImplementedError(
            f"strategy: expected 'auto' or 'replicated' with {name}, for which every rank computes all rows; got "
            f"{shown(ranks.strategy)}"
        )


def gathered_loss(
    ranks: Ranks,
    function: Callable[..., Tensor],
    features: tuple[Any, Any],
    logit_scale: Any,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    because: str,
    *,
    views: bool = False,
    matching: bool = False,
) -> Tensor | Any:
    """A loss of this package of all ranks' rows, with its metrics if they are asked for.

    Parameters
    ----------
    ranks : Ranks
        Who shares it.
    function : callable
        The loss.
    features : tuple
        This rank's rows and columns.
    logit_scale : float, Tensor or pair of Tensor
        The same on all ranks, or of this one's rows [n].
    given : mapping
        Its arguments that have a row for each row or column, by name; None where there is none.
    options : mapping
        The others.
    because : str
        What wants all rows.
    views, matching : bool
        The features are two views, or matching rows.
    """
    with told(ranks, features[0]):
        require_gathering(ranks, because)
        x, y = check_features(*features, ("x", "y"), False, matching=matching, padded=True)
        scale, scales = _scales(x, logit_scale, pair=matching and not views)
        if views:
            _require_one_of_both_views(given)
        parts = {"x": OfRank(x), "y": OfRank(y, True), **scales, **_given(x, y, given, matching=matching)}
        if given.get("guided") is not None:
            of_rows, of_cols = check_guide(given["guided"], x, y, False)
            parts |= {"guided.0": OfRank(of_rows), "guided.1": OfRank(of_cols, True)}
        printed = _checked(options, x, y, scale, with_ids="ids.0" in parts, guided="guided.0" in parts)

    def compute(all_: dict[str, Tensor], of_scale: Any) -> Any:
        x, y = all_.pop("x"), all_.pop("y")
        of_scale = _scales_of_all(all_, of_scale)
        rows: dict[str, Any] = {name: all_[name] for name in all_ if "." not in name}
        if "guided.0" in all_:
            rows["guided"] = all_["guided.0"], all_["guided.1"]
        for name in ("ids", "candidate_bias"):  # of both sides
            if f"{name}.0" in all_:
                rows[name] = all_[f"{name}.0"] if views else (all_[f"{name}.0"], all_[f"{name}.1"])
        return function(x, y, of_scale, **rows, **options)

    return _whole(ranks, function.__name__, parts, scale, compute, printed, options, repeats=2 if views else 1)


def _scales(x: Tensor, logit_scale: Any, *, pair: bool = False) -> tuple[Any, dict[str, OfRank]]:
    """The one scale of all ranks; or 1, and those of this rank's rows [n]. `pair`: there may be two of them."""
    if pair and isinstance(logit_scale, (tuple, list)):
        scales = check_scales_of_both(x, logit_scale)
        return 1.0, {f"logit_scale.{i}": OfRank(each) for i, each in enumerate(scales)}
    if not is_by_row(logit_scale):
        return check_scale(x, logit_scale), {}
    return 1.0, {"logit_scale.": OfRank(check_vector(logit_scale, "logit_scale", len(x), x, differentiable=True))}


def _scales_of_all(all_: dict[str, Tensor], one: Any) -> Any:
    """The same of all ranks' rows, taken out of what they have gathered."""
    found = [all_.pop(name) for name in list(all_) if name.startswith("logit_scale.")]
    return one if not found else found[0] if len(found) == 1 else tuple(found)


def _whole(
    ranks: Ranks,
    name: str,
    parts: Mapping[str, OfRank],
    scale: Any,
    compute: Callable[..., Any],
    printed: Sequence[tuple[str, Any]],
    options: Mapping[str, Any],
    repeats: int = 1,
) -> Tensor | Any:
    """What `compute` gives of all rows, which every rank computes: a loss, perhaps with metrics."""
    if not options.get("return_metrics"):
        return whole_over_ranks(ranks, name, parts, scale, compute, printed, repeats)
    metrics: list[Any] = []

    def apart(*given: Any) -> Tensor:
        loss, told = compute(*given)
        metrics.append(told)
        return cast(Tensor, loss)

    return whole_over_ranks(ranks, name, parts, scale, apart, printed, repeats), metrics[0]


def _checked(
    options: Mapping[str, Any],
    x: Tensor,
    y: Tensor,
    scale: Any,
    *,
    with_ids: bool = False,
    guided: bool = False,
) -> list[tuple[str, Any]]:
    """What options say that all ranks must say alike; all of them are right, for nobody is told once rows are on their
    way."""
    check_reduction(options["reduction"]), check_flag(options["normalize"], "normalize")
    engine = check_engine(options["backend"], options["workspace_bytes"])
    smoothing, include = options.get("label_smoothing", 0.0), options.get("include_positive", True)
    check_flag(include, "include_positive")
    check_smoothing(smoothing, include)
    check_margin_of_loss(options.get("margin"), smoothing)
    check_guided_margin(options.get("guided_margin", 0.0), used=guided)
    check_corrections(*(options.get(name) for name in ("weight_fn", "debiased", "hardness_beta")))
    if "variant" in options:
        check_variant(options["variant"])
    queue = options.get("queue")
    about = None if queue is None else _about(check_queue(queue, x, with_ids))
    problem = Problem(x, y, scale, engine=engine)
    require_panel(problem.backend(), problem.size())
    said = [(name, options[name]) for name in _PRINTED if name in options]
    given = [name for name in ("queue", "weight_fn") if options.get(name) is not None]
    return [*said, ("given", "+".join(given)), ("queue", about)]


def _about(queue: FeatureQueue) -> str:
    """What the queues of all ranks have in common, but for what is in them."""
    return f"{len(queue)} of {queue.features.dtype}" + (" with ids" if queue.ids is not None else "")


def _require_one_of_both_views(given: Mapping[str, Any]) -> None:
    for name in ("ids", "candidate_bias"):
        if given.get(name) is not None and not isinstance(given[name], Tensor):
            raise TypeError(f"{name}: expected None or a tensor of the samples [N]; got {type(given[name]).__name__}")


def _given(x: Tensor, y: Tensor, given: Mapping[str, Any], *, matching: bool) -> dict[str, OfRank]:
    """The checked arguments of this rank's rows and columns."""
    parts: dict[str, OfRank] = {}
    row_ids, col_ids = check_ids(given.get("ids"), "ids", x, y)
    if row_ids is not None and col_ids is not None:
        parts.update({"ids.0": OfRank(row_ids), "ids.1": OfRank(col_ids, True)})
    bias = given.get("candidate_bias")
    if bias is not None and matching:
        pair = (bias, bias) if isinstance(bias, Tensor) else check_pair(bias, "candidate_bias")
        for i, each in enumerate(pair):
            vector = check_vector(each, "candidate_bias", len(x), x, differentiable=True)
            parts[f"candidate_bias.{i}"] = OfRank(vector)
    elif bias is not None:
        parts["candidate_bias"] = OfRank(check_vector(bias, "candidate_bias", len(y), x, differentiable=True), True)
    weights = row_weights(given.get("weight"), len(x), x)
    if weights is not None:
        parts["weight"] = OfRank(weights)
    logits, features = given.get("positive_logits"), given.get("positive_features")
    if logits is not None:
        parts["positive_logits"] = OfRank(check_vector(logits, "positive_logits", len(x), x, differentiable=True))
    if features is not None:
        _, features = check_features(x, features, ("x", "positive_features"), False, matching=True)
        parts["positive_features"] = OfRank(features)
    outside = logits is not None or features is not None
    if not matching and (given.get("positives") is not None or not outside):
        parts["positives"] = OfRank(_index(given.get("positives"), x, y, outside), names_cols=True)
    return parts


def _index(positives: Any, x: Tensor, y: Tensor, outside: bool) -> Tensor:
    """The positives as columns among this rank's own [n], or [n, P]."""
    if isinstance(positives, Tensor) and positives.dim() == 2:
        return check_several_positives(positives, x, y)
    index, offset = check_positives(positives, x, y, allow_missing=outside)
    if index is None:
        assert offset is not None
        index = torch.arange(len(x), dtype=torch.int64, device=x.device) + offset
    return index


def check_candidates(y: Any, y_labels: Any) -> bool:
    """Whether rows are their own candidates, of losses by labels."""
    if (y is None) != (y_labels is None):
        given, missing = ("y", "y_labels") if y_labels is None else ("y_labels", "y")
        raise ValueError(f"{missing}: expected candidates with labels, or neither; got {given} alone")
    return y is None


def check_variant(variant: Any) -> None:
    """Where the mean over a row's positives stands."""
    if variant not in ("outside", "inside"):
        raise ValueError(f"variant: expected 'outside' or 'inside'; got {shown(variant)}")


def gathered_labels(
    ranks: Ranks,
    function: Callable[..., Tensor],
    x: Any,
    logit_scale: Any,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Tensor | Any:
    """A loss by labels of all ranks' rows, and of their candidates, if there are any."""
    with told(ranks, x):
        alone = check_candidates(given["y"], given["y_labels"])
        x, y = check_features(x, x if alone else given["y"], ("x", "x" if alone else "y"), False)
        scale, scales = (check_scale(x, logit_scale), {}) if alone else _scales(x, logit_scale)
        parts = {"x": OfRank(x), **scales, "labels": OfRank(check_labels(given["labels"], "labels", x))}
        if not alone:
            parts["y"] = OfRank(y, True)
            parts["y_labels"] = OfRank(check_labels(given["y_labels"], "y_labels", y), True)
        weights = row_weights(given["weight"], len(x), x)
        if weights is not None:
            parts["weight"] = OfRank(weights)
        printed = _checked(options, x, y, scale)

    def compute(all_: dict[str, Tensor], of_scale: Any) -> Any:
        x, labels = all_.pop("x"), all_.pop("labels")
        of_scale = _scales_of_all(all_, of_scale)
        return function(x, labels, of_scale, **all_, **options)

    return _whole(ranks, function.__name__, parts, scale, compute, printed, options)


def gathered_ranking(
    ranks: Ranks,
    function: Callable[..., Tensor],
    features: tuple[Tensor, Tensor],
    scale: Any,
    given: Mapping[str, Tensor | None],
    guided: Sequence[Tensor] | None,
    options: Mapping[str, Any],
    because: str,
) -> Tensor:
    """Multiple negatives ranking of all ranks' queries and documents; every argument has been checked.

    `given`: what has a row for each query, by name; None where there is none.
    """
    x, y = features
    with told(ranks, x):
        require_gathering(ranks, because)
        problem = Problem(x, y, scale, engine=check_engine(options["backend"], options["workspace_bytes"]))
        require_panel(problem.backend(), problem.size())
    parts = {"x": OfRank(x), "y": OfRank(y)}
    parts |= {name: OfRank(value) for name, value in given.items() if value is not None}
    parts |= {f"guided.{i}": OfRank(each.detach()) for i, each in enumerate(guided or ())}
    printed = [(n, v) for n, v in options.items() if n != "backend"]

    def compute(all_: dict[str, Tensor], of_scale: Any) -> Tensor:
        x, y = all_.pop("x"), all_.pop("y")
        of_guide = [all_.pop(name) for name in parts if name.startswith("guided.")]
        return function(x, y, of_scale, guided=of_guide or None, **all_, **options)

    return whole_over_ranks(ranks, function.__name__, parts, scale, compute, printed)


def wants_all(label_smoothing: Any, candidate_bias: Any, margin: Any, guided: Any, *members: str) -> str:
    """What of a loss is no sum over a rank's own rows; "" where nothing is."""
    smooth = not is_number(label_smoothing) or label_smoothing != 0  # (what is no number is refused later)
    said = {
        "label_smoothing": smooth,
        "candidate_bias": candidate_bias is not None,
        "margin": margin is not None,
        "guided": guided is not None,
    }
    return next((name for name, there in said.items() if there), members[0] if members else "")
