"""What a loss gives, and the least memory in which it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Outcome:
    """A value and its gradients by argument, None where there is none."""

    value: Tensor
    gradients: dict[str, Tensor | None]

    def __getitem__(self, name: str) -> Tensor:
        """The value, or the gradient of this name."""
        return self.value if name == "value" else self.gradients[name]

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Outcome:
        """The same with `function` applied to the value and to the gradients that there are."""
        gradients = {name: None if g is None else function(name, g) for name, g in self.gradients.items()}
        return Outcome(function("value", self.value), gradients)


def smallest_workspace(call: Callable[[int], Any]) -> int:
    """The smallest number of bytes that `call` (forward and backward) accepts, as its own refusals tell it."""
    size = 1
    while True:
        try:
            call(size)
        except ValueError as error:
            words = str(error).replace(",", "").split()
            needed = next(int(word) for word in words if word.isdigit())
            assert words[0] == "workspace_bytes:" and needed > size, error
            size = needed
        else:
            return size
