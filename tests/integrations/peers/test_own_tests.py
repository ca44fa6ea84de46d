"""How the libraries' own tests are compared, and that their clones are at the installed version; without a clone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import own_tests
import pytest

PASSED, FAILED = ("passed", "", True), ("failed", "E   off by 0.1", True)
THEIRS = {"t::a[1]": PASSED, "t::a[2]": PASSED, "t::b": FAILED, "t::c": ("network", "offline mode", False)}


def test_all_that_passed_has_to_pass():
    lines, good = own_tests.compare("lightly", THEIRS, {**THEIRS, "t::b": PASSED}, {})
    assert good and lines[0].startswith("lightly: 2 of the 2 tests") and "2 of them computed here" in lines[0]
    assert {"  1 want a network with its own losses already", "  passes with these alone: t::b"} <= set(lines)


@pytest.mark.parametrize("ours", [{**THEIRS, "t::a[2]": FAILED}, {"t::a[1]": PASSED}], ids=["failed", "missing"])
def test_what_is_lost_has_to_be_listed(ours):
    lines, good = own_tests.compare("lightly", THEIRS, ours, {})
    assert not good and any("t::a[2]: NOT LISTED" in line for line in lines)
    lines, good = own_tests.compare("lightly", THEIRS, ours, {"t::a[[]2]": "its message differs"})
    assert good and any(line.endswith("with these: t::a[2]: its message differs") for line in lines)


def test_what_is_listed_has_to_be_lost():
    lines, good = own_tests.compare("lightly", THEIRS, THEIRS, {"t::a*": "once"})
    assert not good and "  listed as an exception, but all pass: t::a*" in lines


def test_a_comparison_of_nothing_is_no_comparison():
    untouched = {name: (outcome, reason, False) for name, (outcome, reason, _) in THEIRS.items()}
    assert not own_tests.compare("lightly", untouched, untouched, {})[1]


def test_a_file_that_cannot_be_collected_is_named():
    theirs = {**THEIRS, "test_b.py": ("failed", "import requests\nE   ModuleNotFoundError: No module", False)}
    lines, good = own_tests.compare("lightly", theirs, theirs, {})
    assert not good and "  cannot be collected: test_b.py: E   ModuleNotFoundError: No module" in lines


def test_exceptions_name_libraries_and_reasons():
    lines = [line for line in own_tests.EXCEPTIONS.read_text().splitlines() if line and line[0] != "#"]
    listed = [own_tests.exceptions(library.name) for library in own_tests.LIBRARIES]
    assert sum(map(len, listed)) == len(lines) and all(all(each.values()) for each in listed)


@pytest.fixture
def clone(tmp_path) -> Path:
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_the_clone_is_at_the_installed_version(clone, monkeypatch, capsys):
    library = own_tests.METRIC_LEARNING
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0")
    assert "expected the clone at v2.9.0" in own_tests.why_not(library, clone)
    own_tests.git(clone, "tag", "v2.8.1")
    assert own_tests.why_not(library, clone).endswith("it is at v2.8.1")
    monkeypatch.setattr(own_tests, "LIBRARIES", [own_tests.replace(library, folder=clone.name)])
    assert own_tests.main([str(clone.parent)]) == 1
    assert "metric_learning: not run, expected the clone at v2.9.0" in capsys.readouterr().out
    own_tests.git(clone, "tag", "v2.9.0")
    assert own_tests.why_not(library, clone) is None


def test_a_clone_without_such_tests_runs_no_others(clone, monkeypatch, capsys):
    """pytest without a name would run whatever there is."""
    monkeypatch.setattr(own_tests, "LIBRARIES", (own_tests.replace(own_tests.METRIC_LEARNING, folder=clone.name),))
    monkeypatch.setattr(own_tests, "why_not", lambda library, clone: None)
    monkeypatch.setattr(own_tests, "unpack", lambda library, clone, to: [])
    monkeypatch.setattr(own_tests, "run", lambda *_: pytest.fail("something ran"))
    assert own_tests.main([str(clone.parent)]) == 1
    assert "not run, expected some of tests/losses/test_ntxent_loss.py" in capsys.readouterr().out
