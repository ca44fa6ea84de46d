"""tests/backends/test_gpu.py on the CPU, as far as it needs nothing of CUDA: that no test fails for a slip of the pen.

    python tests/rehearsal.py [pytest's options]

Backends are the CPU's, and "float32 by torch's setting" has no meaning; what needs streams, graphs or the allocator is
left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
#: What only a GPU has.
LEFT_OUT = (
    "stream",
    "graph_",
    "captured",
    "synchronises",
    "int32",
    "memory_stays",
    "setting",
    "overlap",
    "own_kernels",
)
CHANGES = {
    "device.py": {'torch.device("cuda")': 'torch.device("cpu")'},
    "backends/test_gpu.py": {
        "if not torch.cuda.is_available():": "if False:",
        'if name != "cpu"]': 'if name in ("cpu", "torch")]',
        'if name != "torch"]': 'if name == "cpu"]',
    },
}


def rehearse(options: list[str]) -> int:
    """Runs changed copies; pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in CHANGES.items():
            text = (TESTS / name).read_text()
            for old, new in changes.items():
                assert text.count(old) == 1, old
                text = text.replace(old, new)
            (Path(folder) / Path(name).name).write_text(text)
        sys.path.insert(0, str(TESTS))
        command = [str(Path(folder) / "test_gpu.py"), "-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest"]
        command += ["-q", "-p", "no:cacheprovider", "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
        return int(pytest.main([*command, *options]))


if __name__ == "__main__":
    sys.exit(rehearse(sys.argv[1:]))
