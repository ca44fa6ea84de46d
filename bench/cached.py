"""``python -m bench.cached``: a step in chunks (gradient caching) beside the plain step, in turns; time and memory.

Beside the ratio stand two floors of it, from the same run: one more forward pass, as fast as the plain step's; and the
passes that gradient caching needs, each timed alone in chunks. What is above the second is the step's own.
"""

from __future__ import annotations

import argparse

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


def main() -> None:
    """Measures and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="of each of two inputs")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    parts = [part for _ in range(args.layers) for part in (nn.Linear(args.width, args.width), nn.GELU())]
    model = nn.Sequential(*parts, nn.Linear(args.width, WIDTH))
    views = tuple(torch.randn(args.rows, args.width) for _ in range(2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ck.clip_loss(x, y, 10.0, normalize=True, workspace_bytes=2**20)

    def plain() -> None:
        loss(model(views[0]), model(views[1])).backward()

    def cached() -> None:
        ck.cached_step(model, views, loss, chunk_size=args.chunk)

    @torch.no_grad()
    def forward() -> None:
        for view in views:
            model(view)

    chunks = [chunk for view in views for chunk in view.split(args.chunk)]
    upstream = [torch.randn(len(chunk), WIDTH) for chunk in chunks]
    features = [torch.randn(args.rows, WIDTH, requires_grad=True) for _ in views]

    def passes() -> None:
        """All that a step in chunks computes: no chunk but the last is encoded twice."""
        with torch.no_grad():
            for chunk in chunks[:-1]:
                model(chunk)
        loss(*features).backward()
        for chunk, gradient in zip(chunks, upstream, strict=True):
            model(chunk).backward(gradient)

    works = [Work(step, "cpu") for step in (cached, plain, forward, passes)]
    for work in works:
        warm_up(work)
    interleave(works, args.rounds)
    ours, whole, once, bare = (work.best for work in works)
    once *= 1 - len(chunks[-1]) / (len(views) * args.rows)
    peaks = ""
    if memory.why_not("cpu") is None:
        sizes = [memory.peak_of(lambda step=step: step() or 0)[0] / 2**20 for step in (cached, plain)]  # type: ignore[misc]
        peaks = f"; {sizes[0]:.0f} MiB beside {sizes[1]:.0f} MiB"
    floors = f"{1 + once / whole:.2f} with one more forward pass, {bare / whole:.2f} with the passes in chunks"
    Console(width=150).print(
        f"in chunks of {args.chunk}: {milliseconds(ours)} ms, {ours / whole:.2f} of the plain step's "
        f"{milliseconds(whole)} ms (floor: {floors}){peaks}; {describe_machine('cpu')}, commit {commit()}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
