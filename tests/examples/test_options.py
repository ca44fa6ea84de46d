"""Options of the examples: every number refuses nonsense, with a word, before any work is done."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from pathlib import Path

import pytest

for module in ("numpy", "matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import options  # noqa: E402

COMMANDS = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
PLAIN = {"--cache", "--out", "folder"}  # paths that are read first, or checked with their defaults


class Parsed(Exception):
    """Ends a command when it parses its arguments."""


def parser_of(name, monkeypatch):
    found = []

    def parse(parser, *_):
        found.append(parser)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            importlib.import_module(name).main()
    return found[0]


def test_there_are_commands():
    assert {"train_clip", "demo", "structures", "synthetic", "half_batch", "gradient_bias"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_refuses_nonsense(name, monkeypatch, capsys):
    parser = parser_of(name, monkeypatch)
    numbers = 0
    for action in parser._actions:
        label = action.option_strings[-1] if action.option_strings else action.dest
        if action.type is None or label in PLAIN:
            assert action.choices or action.nargs == 0 or label in {*PLAIN, "--variants"}, f"{label} takes any text"
            continue
        assert isinstance(action.type, options.Number) or action.type in (options.output_file, options.device_name), (
            f"{label}: a number of any size, or a path that nobody checks"
        )
        if not isinstance(action.type, options.Number):
            continue
        numbers += 1
        for text in ("-5", "nan", "inf", "1e999", "x", "", "9" * 5000, *(["1.5"] if action.type.kind is int else [])):
            given = [f"{label}={text}"] if action.option_strings else ["--", text]
            with pytest.raises(SystemExit) as end:
                parser.parse_args(given)
            assert end.value.code == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert f"{label}: expected {action.type.words}, got" in said, said
        if action.default is not argparse.SUPPRESS and action.default is not None:
            for value in action.default if action.nargs else [action.default]:
                assert action.type.has(value), f"{label}: its own default is refused"
    assert numbers or name == "glyphs"


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("train_clip", ["--save-every", "0"], "--save-every: expected a whole number of at least 1, got '0'"),
        ("train_clip", ["--steps", "-5"], "--steps: expected a whole number of at least 0, got '-5'"),
        ("train_clip", ["--lr", "0"], "--lr: expected a positive number, got '0'"),
        ("train_clip", ["--warmup", "1.1"], "--warmup: expected a number, 0 to 1, got '1.1'"),
        ("train_clip", ["--device", "abacus"], "--device: expected a device of this machine, got 'abacus'"),
        ("train_clip", ["--device", "meta"], "--device: expected a device of this machine, got 'meta'"),
        ("structures", ["--momentum", "1"], r"--momentum: expected a number in [0, 1), got '1'"),
        ("structures", ["--batch", "0"], "--batch: expected a whole number of at least 2, got '0'"),
        ("structures", ["--jobs", "0"], "--jobs: expected a whole number of at least 1, got '0'"),
        ("structures", ["--variants", "bridge=-1"], "variant: expected one of"),
        ("structures", ["--variants", "bridge=nan"], "variant: expected one of"),
        ("half_batch", ["--samples", "20", "--batch", "32"], "--samples: expected at least a batch of 32, got 20"),
        ("memory_defaults", ["--samples", "3", "--batch", "8"], "--samples: expected at least a batch of 8, got 3"),
        ("gradient_bias", ["--samples", "100", "--batch", "8"], "--batch: expected divisors of 100"),
        ("loss_cost", ["0"], "rows: expected a whole number of at least 1, got '0'"),
        ("synthetic", ["--json", "/"], "--json: expected a file that can be written: / is a folder"),
        (
            "synthetic",
            ["--png", "/dev/null/a.png"],
            "--png: expected a file that can be written: /dev/null is no folder",
        ),
    ],
)
def test_nonsense_is_told(name, arguments, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        options.run(importlib.import_module(name).main)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_clip", "demo", "structures"])
def test_a_folder_that_cannot_be_is_told_before_the_work(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "/dev/null/run"])
    with pytest.raises(SystemExit) as end:
        options.run(importlib.import_module(name).main)
    assert end.value.code == f"{name}.py: --out: expected a folder that can be written to: /dev/null is no folder"


def test_a_folder_without_access_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(options.os, "access", lambda *_: False)  # permissions do not bind root
    with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be written to"):
        options.output_file(str(tmp_path / "a" / "b.json"))


def test_a_list_holds_everything_once():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="+", type=options.SEED, action=options.Distinct)
    assert parser.parse_args(["--seeds", "2", "1", "2"]).seeds == [2, 1]


def test_numbers_of_settings():
    assert [options.POSITIVE.has(v) for v in (1, 0.5, 0, -1, float("nan"), float("inf"), True, "1")] == [
        True, True, False, False, False, False, False, False,
    ]  # fmt: skip
    assert [options.SIZE.has(v) for v in (1, 1.0, 0, None)] == [True, False, False, False]
    with pytest.raises(ValueError, match=r"drop: expected a number in \[0, 1\), got 1"):
        options.SHARE.check("drop", 1)


def test_a_folder_without_access_is_named(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.mkdir()
    stat, access = os.stat, os.access

    def refusing(path, *rest, **options):
        if secret in Path(path).parents:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret and access(path, mode))
    with pytest.raises(options.Mistake, match=r"--out: .*secret cannot be written to"):
        options.check_folder(secret / "run" / "x")
    with pytest.raises(argparse.ArgumentTypeError, match="secret cannot be written to"):
        options.output_file(str(secret / "x.json"))
