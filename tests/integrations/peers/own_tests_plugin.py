"""A plugin for pytest under which another library's tests run: with its own losses or these, on equal random numbers.

``-p own_tests_plugin --library lightly --losses ours --outcomes FILE`` writes what came of each test, and which of them
were computed here.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision  # noqa: F401  (before the libraries)

#: What is said where a model or a data set cannot be had.
_NETWORK = re.compile(
    r"offline mode|HF_HUB_OFFLINE|OfflineModeIsEnabled|LocalEntryNotFound|ConnectionError|Max retries exceeded|"
    r"[Nn]ame resolution|Name or service not known|urlopen error|ProxyError|[Cc]ould ?n.t (connect|reach)"
)
_WORST = ("failed", "network", "skipped", "passed")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("own tests")
    group.addoption("--library", help="a module of contrastive_kernels.integrations")
    group.addoption("--losses", choices=("theirs", "ours"))
    group.addoption("--outcomes", type=Path, help="the file that is written")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before anything of theirs is imported, which may take losses by their names."""
    given = early_config.known_args_namespace
    # the library that is installed, and not one that lies beside its tests
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
    module = importlib.import_module(f"contrastive_kernels.integrations.{given.library}")
    outcomes = Outcomes(given.outcomes)
    if given.losses == "ours":
        _count_calls(module, outcomes)
        module.install()
    early_config.pluginmanager.register(outcomes)


def _count_calls(module: types.ModuleType, outcomes: Outcomes) -> None:
    """Tells where a loss of this package is called by the integration."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **options: Any) -> Any:
            outcomes.here = True
            return function(*given, **options)

        return call

    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and value.__module__.startswith("contrastive_kernels.losses"):
            setattr(module, name, counted(value))


class Outcomes:
    """What came of each test: its outcome, the reason if it did not pass, and whether it was computed here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, tuple[str, str, bool]] = {}
        self.here = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.here = False
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (what their tests draw from)
        torch.manual_seed(0)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._add(report.nodeid, report.outcome, _reason(report))

    def _add(self, name: str, outcome: str, reason: str) -> None:
        """The worst of a test's parts: its setting up, its call, its subtests."""
        if outcome == "failed" and _NETWORK.search(reason):
            outcome = "network"
        before = self.found.get(name, ("passed", "", False))
        if _WORST.index(outcome) > _WORST.index(before[0]):
            outcome, reason, _ = before
        self.found[name] = (outcome, reason[-2000:], before[2] or self.here)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.found))


def _reason(report: Any) -> str:
    return "" if report.outcome == "passed" else str(report.longreprtext or report.longrepr)
