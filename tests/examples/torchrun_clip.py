"""examples/train_clip.py in float64 on a small data set, for torchrun; it may be killed in the middle.

In float32 Adam's first steps, which have little but the gradients' signs, make much of rounding.

STATE: a folder, where every drawing of the data set leaves a file. KILL: "process step", which dies before that step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import glyphs  # noqa: E402
import numpy as np  # noqa: E402
import options  # noqa: E402
import processes  # noqa: E402
import torch  # noqa: E402
import towers  # noqa: E402
import train_clip  # noqa: E402

draw, step, load = glyphs._draw, train_clip.Trainer.train_step, glyphs.load_glyphs


@contextlib.contextmanager
def in_float64():
    """Whatever the example makes is float64."""
    prepare = towers.prepare_images
    towers.prepare_images = lambda images: prepare(images).double()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        towers.prepare_images = prepare


def counted(*arguments):
    (Path(os.environ["STATE"]) / f"drawn-{uuid.uuid4().hex}").touch()
    return draw(*arguments)


def small(folder):
    data = load(folder, faces=(0, 7), progress=False)
    return data.subset(characters=np.flatnonzero(data.codepoints < 0x400))


def mortal(trainer):
    if os.environ.get("KILL") == f"{processes.number()} {trainer.step}":
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer)


if __name__ == "__main__":
    glyphs._draw, train_clip.load_glyphs, train_clip.Trainer.train_step = counted, small, mortal
    with in_float64():
        options.run(train_clip.main)
