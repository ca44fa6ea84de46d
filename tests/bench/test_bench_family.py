"""What members cost: all of them at their smallest sizes, as they are asked for; and a ratio of its own run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import family
from bench.__main__ import main


def test_everything_is_measured(capsys):
    assert main(["--family", "--quick"]) == 0
    printed = capsys.readouterr().out
    for member in family.members(quick=True):
        assert member.title in printed


def test_a_goal_that_is_not_met_is_told(monkeypatch, capsys):
    """In the table and by the exit status."""
    member = family.members(quick=True)[0]
    for goal, status in ((0.0, 1), (1e9, 0)):
        monkeypatch.setattr(family, "members", lambda quick, goal=goal: [dataclasses.replace(member, goal=goal)])
        assert main(["--family", "--quick"]) == status
        assert ("not met" in capsys.readouterr().out) == bool(status)


def test_goals_are_those_of_large_sizes():
    goals = {member.goal for member in family.members()}
    assert goals == {family.GOAL, family.GOAL_OF_LABELS, *family.GOALS_OF_GUIDE.values()}


def test_members_are_what_they_say():
    """Each gives another value than the loss without it, or other gradients."""
    for member in family.members(quick=True):
        x, y = family.make_features(member.m or member.n, member.d)
        x, y = x[: member.n].clone().requires_grad_(), y.requires_grad_()
        results = []
        for make in (member.member, family._of(member.plain)):
            loss, leaves = make(x, y)
            value = loss()
            results.append((value.detach(), len(torch.autograd.grad(value, leaves)), leaves[2].shape))
        (ours, *asked), (plain, *usual) = results
        assert not torch.equal(ours, plain) or asked != usual, member.title


def test_other_options_are_refused():
    with pytest.raises(SystemExit):
        main(["--family", "--n", "64"])
