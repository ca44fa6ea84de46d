"""The examples: curves of small programs, and the towers that open_clip's own program trains, on one rank and two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vision  # noqa: F401  (before the libraries)

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "integrations"
sys.path.insert(0, str(EXAMPLES))

import same_curves  # noqa: E402


@pytest.mark.parametrize("name", same_curves.PROGRAMS)
def test_curves_are_the_same(name, capsys):
    off = same_curves.compare(name)
    assert off is not None and off <= same_curves.ALLOWED
    start, end = re.findall(r"[\d.]+ to [\d.]+", capsys.readouterr().out)[-1].split(" to ")
    assert name == "lightly_moco" or float(end) < 0.7 * float(start), "it learns"


def test_unknown_programs_are_named(capsys):
    assert same_curves.main(["fairseq"]) == 2
    assert "expected some of lightly_simclr" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_open_clips_own_program(ranks, tmp_path):
    """In a process of its own, which makes torchvision importable first."""
    program = tmp_path / "program.py"
    script = EXAMPLES / "open_clip_training.py"
    program.write_text(f"import runpy, vision\nrunpy.run_path({str(script)!r}, run_name='__main__')\n")
    command = [sys.executable, str(program)]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    paths = os.pathsep.join([str(EXAMPLES.parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"largest difference", done.stdout)) == {1: 4, 2: 3}[ranks]
