"""The losses by labels as the problems meet them: all features in one set, or x against labelled candidates y."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contrastive_kernels.reference import labels as definitions

if TYPE_CHECKING:
    from problems import Inputs, Problem

#: Every name, with its function and its further arguments.
LABELLED: dict[str, tuple[str, dict[str, Any]]] = {
    "sup_con": ("sup_con", {}),
    "sup_con_inside": ("sup_con", {"variant": "inside"}),
    "sup_con_wide": ("sup_con", {}),
    "sup_con_inside_wide": ("sup_con", {"variant": "inside"}),
    "multi_positive_nce": ("multi_positive_nce", {}),
    "multi_positive_nce_wide": ("multi_positive_nce", {}),
}
#: Those of one set: x and y are parts of it.
ONE_SET = tuple(name for name in LABELLED if not name.endswith("_wide"))


def fits(problem: Problem, loss: str) -> bool:
    """Whether a problem says nothing that these losses do not know."""
    said = problem.positives, problem.candidate_bias, problem.margin, problem.block, problem.bias == -10.0 or None
    if any(value is not None for value in said) or problem.decomposable or problem.staleness:
        return False
    square = problem.m is None or problem.m == problem.n
    return problem.include_positive and not problem.label_smoothing and (square or loss not in ONE_SET)


def labels_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Of the rows and of the columns: their ids, or three of a class; in a solved batch, x_i and y_i are one."""
    if inputs.ids is not None:
        return inputs.ids
    of_class = 1 if inputs.problem.features == "solved" else 3
    rows, cols = (torch.arange(len(v)) // of_class - 2 for v in (inputs.x, inputs.y))
    return rows, cols


def call(
    inputs: Inputs, module: Any, loss: str, x: Tensor, y: Tensor, scale: Tensor | float, options: dict[str, Any]
) -> Any:
    """The loss as `module` computes it."""
    name, more = LABELLED[loss]
    function, (rows, cols), weight = getattr(module, name), labels_of(inputs), inputs.weight
    if loss in ONE_SET:
        both = None if weight is None else torch.cat([weight, weight])
        return function(torch.cat([x, y]), torch.cat([rows, cols]), scale, weight=both, **more, **options)
    return function(x, rows, scale, y=y, y_labels=cols, weight=weight, **more, **options)


def of_logits(inputs: Inputs, loss: str, z: Tensor, reduction: str) -> Tensor:
    """The definition of a loss of one set, from logits."""
    name, more = LABELLED[loss]
    labels = torch.cat(labels_of(inputs))
    weight = None if inputs.weight is None else inputs.weight.repeat(2)
    own = torch.eye(len(z), dtype=torch.bool)
    if name == "sup_con":
        variant = more.get("variant", "outside")
        return definitions.sup_con_of_logits(z, labels, labels, own, variant, weight, reduction)
    return definitions.multi_positive_of_logits(z, labels, labels, own, weight, reduction)
