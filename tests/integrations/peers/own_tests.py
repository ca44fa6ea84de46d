"""Other libraries' own tests of their losses, twice: with their losses, and with ``contrastive_kernels.integrations``.

    python tests/integrations/peers/own_tests.py FOLDER                    clones of the libraries' repositories
    python tests/integrations/peers/own_tests.py FOLDER lightly open_clip

Whatever passes with the library's own loss has to pass with ours, but for what own_tests_exceptions.txt lists with the
reason. A clone has to be at the tag of the version that is installed; ``--any-version`` runs others too. Models are not
fetched: tests that want one run with neither loss (HF_HUB_OFFLINE=0 fetches them).
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXCEPTIONS = HERE / "own_tests_exceptions.txt"
#: What pytest reads beside the tests, and the sources that transformers' tests look at.
BESIDE = ("conftest.py", "pytest.ini", "pyproject.toml", "setup.cfg", "tox.ini", "src", "utils")

Found = dict[str, tuple[str, str, bool]]


@dataclass(frozen=True)
class Library:
    """Tests of a library's losses, and what they run with."""

    module: str
    distribution: str
    folder: str
    tests: tuple[str, ...]
    keyword: str = ""
    #: told apart by a word, where one library has two of them
    variant: str = ""
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.module}:{self.variant}" if self.variant else self.module


METRIC_LEARNING = Library(
    "metric_learning",
    "pytorch-metric-learning",
    "pytorch-metric-learning",
    (
        "tests/losses/test_ntxent_loss.py",
        "tests/losses/test_cross_batch_memory.py",
        "tests/losses/test_self_supervised_loss.py",
        "tests/losses/test_losses_without_labels.py",
    ),
    environment=(("TEST_DEVICE", "cpu"), ("TEST_DTYPES", "float32,float64")),
)
LIBRARIES = (
    Library(
        "open_clip",
        "open_clip_torch",
        "open_clip",
        # (examples/integrations runs its training program; test_training_simple.py trains large models for an hour)
        ("tests/test_loss.py", "tests/test_siglip_chunked_loss.py"),
    ),
    Library(
        "lightly",
        "lightly",
        "lightly",
        ("tests/loss/test_ntx_ent_loss.py", "tests/loss/test_dcl_loss.py", "tests/utils/test_dist__gather__losses.py"),
    ),
    METRIC_LEARNING,
    replace(METRIC_LEARNING, variant="float16", environment=(("TEST_DEVICE", "cpu"), ("TEST_DTYPES", "float16"))),
    Library(
        "sentence_transformers",
        "sentence-transformers",
        "sentence-transformers",
        ("tests/sentence_transformer/losses",),
    ),
    Library(
        "transformers",
        "transformers",
        "transformers",
        ("tests/models/clip/test_modeling_clip.py", "tests/models/siglip/test_modeling_siglip.py"),
        keyword="CLIPModelTest or SiglipModelTest",
    ),
)


def git(clone: Path, *command: str) -> bytes:
    return subprocess.run(["git", "-C", str(clone), *command], capture_output=True, check=True).stdout


def why_not(library: Library, clone: Path) -> str | None:
    """Why a clone's tests are not those of the version that is installed."""
    installed = importlib.metadata.version(library.distribution)
    tags = git(clone, "tag", "--points-at", "HEAD").decode().split()
    if {installed, f"v{installed}"} & set(tags):
        return None
    at = ", ".join(tags) or git(clone, "log", "-1", "--format=%h of %cs").decode().strip()
    return f"expected the clone at v{installed}, the version that is installed; it is at {at}"


def unpack(library: Library, clone: Path, to: Path) -> list[str]:
    """The tests as they are committed, where running them leaves nothing behind; gives the names of those there are."""
    there = set(git(clone, "ls-tree", "-r", "-t", "--name-only", "HEAD").decode().splitlines())
    wanted = ["tests", *(name for name in BESIDE if name in there)]
    with tarfile.open(fileobj=io.BytesIO(git(clone, "archive", "HEAD", *wanted))) as packed:
        packed.extractall(to, filter="data")
    return [name for name in library.tests if name in there]


def run(library: Library, tests: list[str], folder: Path, losses: str) -> Found:
    """What came of each test."""
    outcomes = folder.parent / f"{losses}.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "own_tests_plugin", *tests]
    command += ["--library", library.module, "--losses", losses, "--outcomes", str(outcomes)]
    command += ["-k", library.keyword] if library.keyword else []
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(HERE), str(HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **dict(library.environment)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if not outcomes.exists():
        raise RuntimeError(f"{library.name}: pytest ended with {done.returncode}\n{done.stdout[-4000:]}{done.stderr}")
    found: Found = {name: tuple(each) for name, each in json.loads(outcomes.read_text()).items()}
    return found


def exceptions(name: str) -> dict[str, str]:
    """Patterns of a library's tests that fail with our losses, and why."""
    lines = (line.split(maxsplit=2) for line in EXCEPTIONS.read_text().splitlines() if line and line[0] != "#")
    return {pattern: reason for library, pattern, reason in lines if library == name}


def compare(library: str, theirs: Found, ours: Found, listed: dict[str, str]) -> tuple[list[str], bool]:
    """Lines to print of two runs, and whether all is as it should be."""
    passed = [{name for name, each in found.items() if each[0] == "passed"} for found in (theirs, ours)]
    lost, gained = sorted(passed[0] - passed[1]), sorted(passed[1] - passed[0])
    kept = passed[0] & passed[1]
    here = sum(ours[name][2] for name in kept)
    lines = [
        f"{library}: {len(kept)} of the {len(passed[0])} tests that pass with its own losses pass with these, "
        f"{here} of them computed here"
    ]
    neither = {name: each[0] for name, each in theirs.items() if each[0] != "passed"}
    for outcome, what in (("network", "want a network"), ("skipped", "are skipped"), ("failed", "fail")):
        count = list(neither.values()).count(outcome)
        lines += [f"  {count} {what} with its own losses already"] if count else []
    lines += [f"  passes with these alone: {name}" for name in gained]
    unread = [
        f"{name}: {reason.splitlines()[-1]}" for name, (_, reason, _) in theirs.items() if reason and "::" not in name
    ]
    lines += [f"  cannot be collected: {each}" for each in unread]
    good = bool(here) and not unread
    if not here:
        lines.append("  no test was computed here: nothing was compared")
    used = set()
    for name in lost:
        why = [pattern for pattern in listed if fnmatch.fnmatchcase(name, pattern)]
        used |= set(why)
        good &= bool(why)
        outcome, reason, _ = ours.get(name, ("missing", "", False))
        lines.append(f"  {outcome} with these: {name}: {listed[why[0]] if why else 'NOT LISTED' + chr(10) + reason}")
    for pattern in listed:
        if pattern not in used and any(fnmatch.fnmatchcase(name, pattern) for name in passed[0]):
            good = False
            lines.append(f"  listed as an exception, but all pass: {pattern}")
    return lines, good


def main(given: list[str] | None = None) -> int:
    """Runs the libraries whose clones are there; 1 if a test was lost or a clone is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=", ".join(dict.fromkeys(each.folder for each in LIBRARIES)))
    parser.add_argument("libraries", nargs="*", help="all that are there if none is named")
    parser.add_argument("--any-version", action="store_true", help="clones at another version too")
    args = parser.parse_args(given)
    known = {each.module for each in LIBRARIES}
    if not known.issuperset(args.libraries):
        parser.error(f"expected some of {', '.join(sorted(known))}; got {', '.join(args.libraries)}")
    if not any((args.folder / each.folder).is_dir() for each in LIBRARIES):
        parser.error(f"expected clones such as {args.folder / 'lightly'}; there is none")
    good = True
    for library in LIBRARIES:
        if args.libraries and library.module not in args.libraries:
            continue
        clone = args.folder / library.folder
        if not clone.is_dir():
            print(f"{library.name}: not run, there is no {clone}")
            good &= not args.libraries
            continue
        reason = why_not(library, clone)
        if reason is not None:
            print(f"{library.name}: {'' if args.any_version else 'not run, '}{reason}")
            if not args.any_version:
                good = False
                continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, library.folder)
            tests = unpack(library, clone, folder)
            if not tests:  # pytest would run whatever there is
                print(f"{library.name}: not run, expected some of {', '.join(library.tests)} in the clone; it has none")
                good = False
                continue
            theirs, ours = (run(library, tests, folder, losses) for losses in ("theirs", "ours"))
        lines, well = compare(library.name, theirs, ours, exceptions(library.name))
        print("\n".join(lines), flush=True)
        good &= well
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
