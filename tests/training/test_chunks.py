"""Random states of an accelerator that is not here, and inputs in parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contrastive_kernels.training import chunks


class Accelerator:
    """What torch has of a kind of device: a generator, or one for each of two devices."""

    def __init__(self, several: bool, begun: bool = True) -> None:
        self.states, self.begun = [torch.tensor([0]), torch.tensor([0])], begun
        if several:
            self.get_rng_state_all = lambda: [state.clone() for state in self.states]
            self.set_rng_state_all = self._set_all

    def _set_all(self, states: Any) -> None:
        self.states = [state.clone() for state in states]

    def get_rng_state(self) -> torch.Tensor:
        return self.states[0].clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.states[0] = state.clone()

    def is_initialized(self) -> bool:
        return self.begun

    def draw(self, device: int) -> None:
        self.states[device] += 1


def present(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
    here = SimpleNamespace(is_available=lambda: True, current_accelerator=lambda: torch.device("cuda"))
    monkeypatch.setattr(chunks.torch, "accelerator", here)
    monkeypatch.setattr(chunks.torch, "get_device_module", lambda device: accelerator)


@pytest.mark.parametrize("several", [True, False])
def test_an_accelerators_generators_are_restored(several, monkeypatch):
    accelerator = Accelerator(several)
    present(monkeypatch, accelerator)
    state = chunks.RandomState()
    drawn = torch.rand(2)
    accelerator.draw(0)
    accelerator.draw(1)
    with chunks.kept_random_state():
        state.restore()
        assert [s.item() for s in accelerator.states] == ([0, 0] if several else [0, 1])
        assert torch.equal(torch.rand(2), drawn)
    assert [s.item() for s in accelerator.states] == [1, 1]


def test_an_accelerator_that_is_not_in_use_is_left_alone(monkeypatch):
    """Asking for its state would begin to use it."""
    accelerator = Accelerator(several=True, begun=False)
    present(monkeypatch, accelerator)
    state = chunks.RandomState()
    accelerator.draw(0)
    state.restore()
    assert accelerator.states[0].item() == 1


def test_parts_of_everything():
    """Tensors and lists by rows, all else as it is; the last part is what is left."""
    value = {"a": torch.arange(5), "b": (list("abcde"), torch.arange(10).reshape(5, 2)), "c": 7, "d": torch.tensor(3)}
    assert chunks.rows_of(value, "x") == 5
    first, second, third = chunks.chunks_of(value, 5, 2)
    assert first["b"][0] == ["a", "b"] and second["a"].tolist() == [2, 3]
    assert third["b"][1].tolist() == [[8, 9]] and third["c"] == 7 and third["d"] is value["d"]
    assert [len(part) for part in chunks.chunks_of([], 0, 4)] == [0]
