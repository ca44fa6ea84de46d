"""One call of a primitive: what its passes are functions of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.problem import Problem

__all__ = ["Call", "Outputs"]

Outputs = tuple[Any, ...]

#: Tensors that a problem itself has: x, y, scale, bias, index, col_bias.
PROBLEM_TENSORS = 6


@dataclass(slots=True)  # frozen ones take three times as long to make
class Call:
    """One call of a primitive: the problem, the tensors beside it, its settings, and which tensors want gradients."""

    problem: Problem
    extras: tuple[Tensor | None, ...]
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All of them, the problem's first."""
        return (*self.problem.tensors(), *self.extras)

    @property
    def statics(self) -> tuple[Any, ...]:
        """All that is no tensor, but for the offset."""
        return self.problem.statics(), self.settings, self.needs

    @classmethod
    def of(cls, tensors: Sequence[Any], offset: int | None, statics: tuple[Any, ...]) -> Call:
        """The call of these tensors and statics."""
        of_problem, settings, needs = statics
        problem = Problem.of(tuple(tensors[:PROBLEM_TENSORS]), offset, of_problem)
        return cls(problem, tuple(tensors[PROBLEM_TENSORS:]), settings, needs)

    @property
    def wants(self) -> tuple[bool, bool, bool]:
        """Whether gradients of x, of y, and of scale or bias are wanted."""
        return self.needs[0], self.needs[1], self.needs[2] or self.needs[3]
