"""What a step in chunks holds beside the plain one, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory and resets it"
)

MIB = 2**20
ROWS, WIDTH, LAYERS, CHUNK = 1024, 512, 6, 64
#: Vectors, the loss's workspace, the BLAS library's own.
SLACK = 8 * MIB

#: Prints the peak beyond what was there before, of the plain step and of the one in chunks.
PROGRAM = """
import json, sys
import torch
from torch import nn
import contrastive_kernels as ck

rows, width, layers, chunk = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
model = nn.Sequential(*parts, nn.Linear(width, 32))
views = tuple(torch.randn(rows, width) for _ in range(2))

def loss(a, b):
    return ck.clip_loss(a, b, 10.0, normalize=True, workspace_bytes=2**20)

def plain():
    loss(model(views[0]), model(views[1])).backward()

def cached():
    ck.cached_step(model, views, loss, chunk_size=chunk)

def resident(field):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields[field].split()[0]) * 1024

peaks = {}
for round in range(2):
    for step in (cached, plain):
        before = resident("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # resets the peak
        step()
        if round:  # in the first one gradients and libraries' buffers come to be
            peaks[step.__name__] = resident("VmHWM") - before
print(json.dumps(peaks))
"""


def test_memory_is_that_of_a_chunk():
    """Two inputs of 1,024 rows through one encoder, in chunks of 64."""
    # an allocator that gives blocks back at once: otherwise memory in use hides behind memory kept
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM, json.dumps([ROWS, WIDTH, LAYERS, CHUNK])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    peaks = json.loads(result.stdout)
    a_row = 2 * LAYERS * WIDTH * 4  # saved for backward: inputs of the products, and those of the activations
    assert peaks["plain"] > 0.9 * 2 * ROWS * a_row, "the measurement sees activations"
    # a chunk's activations, and of the whole batch features and their gradients
    assert peaks["cached"] < 1.5 * CHUNK * a_row + 2 * ROWS * 32 * 4 * 4 + SLACK
