"""``python -m bench.cached``: a step in chunks (gradient caching) beside the plain step, in turns; time and memory.

Two models: a small Transformer over tokens, and a thin stack of linear layers, of whose step more is what chunks cost
by themselves. Beside the ratio stand two floors of it, from the same run: one more forward pass, as
fast as the plain step's; and the passes that gradient caching needs, each timed alone in chunks. What is above the
second is the step's own.

What a step frees stays with the process, as a GPU's allocator keeps it: else the plain step takes its gigabytes anew
from the system every time, page by page, and the ratio is better than either floor (``--give-back``).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

import contrastive_kernels as ck

from . import memory
from .measure import Work, interleave, warm_up
from .report import milliseconds
from .results import commit, describe_machine

__all__ = ["main"]

#: Of the features.
WIDTH = 32
VOCABULARY = 1000
#: glibc's numbers for mallopt: how much free memory goes back to the system, and how large a block is mapped by itself.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


class Transformer(nn.Module):
    """Features of sequences: the mean over their tokens."""

    def __init__(self, layers: int, width: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, tokens] to [N, WIDTH]."""
        out: Tensor = self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))
        return out


def transformer(rows: int, dropout: float = 0.0) -> tuple[nn.Module, list[Tensor]]:
    """Two layers of 256 over 32 tokens. A CPU draws dropout's numbers one after the other, in forward passes alone."""
    return Transformer(2, 256, 32, dropout), [torch.randint(VOCABULARY, (rows, 32)) for _ in range(2)]


def thin(rows: int) -> tuple[nn.Module, list[Tensor]]:
    """Six layers of 512."""
    parts = [part for _ in range(6) for part in (nn.Linear(512, 512), nn.GELU())]
    return nn.Sequential(*parts, nn.Linear(512, WIDTH)), [torch.randn(rows, 512) for _ in range(2)]


MODELS: dict[str, Callable[[int], tuple[nn.Module, list[Tensor]]]] = {
    "transformer": transformer,
    "dropout": partial(transformer, dropout=0.1),
    "thin": thin,
}


def loss_of(x: Tensor, y: Tensor) -> Tensor:
    """Of all features."""
    return ck.clip_loss(x, y, 10.0, normalize=True, workspace_bytes=2**20)


@dataclass
class Steps:
    """What is timed, by one model's parameters."""

    model: nn.Module
    views: list[Tensor]
    chunk: int

    def __post_init__(self) -> None:
        self.chunks = [chunk for view in self.views for chunk in view.split(self.chunk)]
        self.upstream = [torch.randn(len(chunk), WIDTH) for chunk in self.chunks]
        self.features = [torch.randn(len(view), WIDTH, requires_grad=True) for view in self.views]

    def cached(self) -> None:
        """The step in chunks."""
        ck.cached_step(self.model, self.views, loss_of, chunk_size=self.chunk)

    def plain(self) -> None:
        """The plain step."""
        loss_of(*(self.model(view) for view in self.views)).backward()

    @torch.no_grad()
    def forward(self) -> None:
        """One more forward pass, as the plain step has it."""
        for view in self.views:
            self.model(view)

    def passes(self) -> None:
        """All that a step in chunks computes: no chunk but the last is encoded twice."""
        with torch.no_grad():
            for chunk in self.chunks[:-1]:
                self.model(chunk)
        loss_of(*self.features).backward()
        for chunk, gradient in zip(self.chunks, self.upstream, strict=True):
            self.model(chunk).backward(gradient)


def measured(name: str, rows: int, chunk: int, rounds: int) -> str:
    """Time and memory of one model, in a line."""
    torch.manual_seed(0)
    steps = Steps(*MODELS[name](rows), chunk)
    works = [Work(step, "cpu") for step in (steps.cached, steps.plain, steps.forward, steps.passes)]
    for work in works:
        warm_up(work)
    interleave(works, rounds)
    ours, whole, once, bare = (work.best for work in works)
    once *= 1 - len(steps.chunks[-1]) / (len(steps.views) * rows)
    ratios = [ours / whole for ours, whole in zip(works[0].seconds, works[1].seconds, strict=True)]
    peaks = ""
    if memory.why_not("cpu") is None:
        sizes = [memory.peak_of(lambda step=step: step() or 0)[0] / 2**20 for step in (steps.cached, steps.plain)]  # type: ignore[misc]
        peaks = f"; {sizes[0]:.0f} MiB beside {sizes[1]:.0f} MiB"
    return (
        f"{name}, {rows} rows in chunks of {chunk}: {milliseconds(ours)} ms, {ours / whole:.2f} of the plain step's "
        f"{milliseconds(whole)} ms (rounds {min(ratios):.2f} to {max(ratios):.2f}; floors {1 + once / whole:.2f} with "
        f"one more forward pass, {bare / whole:.2f} with the passes in chunks){peaks}"
    )


def keep_freed_memory() -> bool:
    """Whether the C library now keeps what is freed."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return all(library.mallopt(name, 2**31 - 1) for name in (MMAP_THRESHOLD, TRIM_THRESHOLD))
    return False


def main() -> None:
    """Measures and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["transformer", "thin"])
    parser.add_argument("--rows", type=int, default=1024, help="of each of two inputs")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--give-back", action="store_true", help="freed memory goes back to the system")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = "kept" if not args.give_back and keep_freed_memory() else "given back"
    console = Console(width=200)
    console.print(
        f"{describe_machine('cpu')}, {args.threads} threads, torch {torch.__version__}, commit {commit()}; "
        f"freed memory is {kept}",
        highlight=False,
    )
    for name in args.models:
        console.print(measured(name, args.rows, args.chunk, args.rounds), highlight=False)


if __name__ == "__main__":
    main()
