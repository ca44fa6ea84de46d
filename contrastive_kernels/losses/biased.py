"""Softmax losses whose candidates have biases on both sides: a bias of columns is none of rows, so a pass for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..arguments.checks import check_pair
from ..arguments.pairs import with_biases, without_padding
from ..arguments.reduction import row_gains, row_weights
from ..engine.matrix import Problem
from ..operators.softmax_loss import softmax_loss

__all__ = ["one_way", "pairs_with_biases", "views_with_biases"]


def pairs_with_biases(problem: Problem, candidate_bias: Any, weight: Any, reduction: str, **options: Any) -> Tensor:
    """The mean of both directions of matching rows x, y [N, D]; biases of x and of y [N], or one for both."""
    if isinstance(candidate_bias, Tensor):
        candidate_bias = candidate_bias, candidate_bias
    of_x, of_y = check_pair(candidate_bias, "candidate_bias")
    back = replace(problem, x=problem.y, y=problem.x, pairs=problem.pairs.turned())
    there = one_way(_biased(problem, of_y), weight, reduction, options)
    return (there + one_way(_biased(back, of_x), weight, reduction, options)) / 2


def views_with_biases(problem: Problem, weight: Any, reduction: str, **options: Any) -> Tensor:
    """NT-Xent of views [2N, D], not as a symmetric matrix; weights of the samples [N]."""
    weights = row_weights(weight, problem.x.shape[0] // 2, problem.x)
    return one_way(problem, None if weights is None else torch.cat([weights, weights]), reduction, options)


def _biased(problem: Problem, bias: Any) -> Problem:
    return replace(problem, pairs=with_biases(problem.pairs, bias, problem.x, problem.y))


def one_way(problem: Problem, weight: Any, reduction: str, options: dict[str, Any]) -> Tensor:
    """InfoNCE of rows with weights [N], whose padding nobody reads."""
    x, y, weight = without_padding(problem.x, problem.y, problem.pairs, problem.offset, problem.index, weight)
    gains = row_gains(weight, x.shape[0], x, reduction)
    return softmax_loss(replace(problem, x=x, y=y), gains, reduction, **options)
