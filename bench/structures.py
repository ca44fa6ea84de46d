"""``python -m bench.structures``: what this package does without a table of N x N, against the formula that has one.

Latent structures, sampled negatives and retrieval have no provider but us and plain torch, so they stand beside the
main benchmark: each pair is checked against each other, then timed in turns within one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

import contrastive_kernels as ck

from .measure import Work, interleave, warm_up
from .report import milliseconds
from .results import describe_machine

__all__ = ["Comparison", "comparisons", "main"]

#: Largest relative difference of value and gradients between the two (float32 sums over N^2 pairs).
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Ours and the dense formula, each a function of x, y [N, D] that returns what to compare.

    Parameters
    ----------
    name : str
        What is computed.
    ours, dense : callable
        (x, y) -> a scalar to differentiate, or a tensor of results.
    target : float
        How many times faster ours has to be at N = 8,192, D = 256 on a CPU; 0: nothing is promised.
    trains : bool
        The time includes backward.
    """

    name: str
    ours: Callable[[Tensor, Tensor], Tensor]
    dense: Callable[[Tensor, Tensor], Tensor]
    target: float = 0.0
    trains: bool = True


def cyclip(image: Tensor, text: Tensor, cross: float, intra: float) -> Tensor:
    """CyCLIP's two cyclic terms as its formula has them: three tables of N x N."""
    image_text, image_image, text_text = image @ text.T, image @ image.T, text @ text.T
    terms = cross * (image_text - image_text.T).square().sum() + intra * (image_image - text_text).square().sum()
    return terms / len(image)


def dense_uniformity(image: Tensor, text: Tensor) -> Tensor:
    """The uniformity term with both tables."""
    tables = torch.cat([(4 * (v @ v.T) - 4).flatten() for v in (image, text)])
    return torch.logsumexp(tables, 0) - torch.full((), float(len(image))).log()


def our_uniformity(image: Tensor, text: Tensor) -> Tensor:
    """The same, streamed."""
    loss = ck.feature_separation(image, text, image, text, None, None, 1.0, orthogonality=0.0)
    assert isinstance(loss, Tensor)
    return loss


def dense_samples(x: Tensor, y: Tensor) -> Tensor:
    """Negatives by softmax and multinomial, as image-text matching is usually written."""
    weights = torch.softmax(14.0 * x @ y.T, 1).fill_diagonal_(0.0)
    return torch.multinomial(weights, 1)[:, 0]


def dense_hardest(x: Tensor, y: Tensor) -> Tensor:
    """The largest score of every row but for the diagonal."""
    return (x @ y.T).fill_diagonal_(-torch.inf).argmax(1)


def dense_ranks(x: Tensor, y: Tensor) -> Tensor:
    """Ranks from the whole matrix of scores."""
    scores = x @ y.T
    return (scores >= scores.diagonal()[:, None]).sum(1) - 1


def comparisons() -> list[Comparison]:
    """Everything that is compared."""
    return [
        Comparison("geometric consistency", ck.geometric_consistency, lambda v, t: cyclip(v, t, 1.0, 1.0), 50.0),
        Comparison(
            "geometric consistency, 1 and 0.5",
            lambda v, t: ck.geometric_consistency(v, t, intra=0.5),
            lambda v, t: cyclip(v, t, 1.0, 0.5),
            40.0,
        ),
        Comparison("uniformity", our_uniformity, dense_uniformity),
        Comparison("sampled negatives", lambda x, y: ck.sample_negatives(x, y, 14.0), dense_samples, trains=False),
        Comparison("hardest negatives", ck.hardest_negatives, dense_hardest, trains=False),
        Comparison("ranks of retrieval", lambda x, y: ck.retrieval_metrics(x, y).ranks, dense_ranks, trains=False),
    ]


def make_features(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit-norm features of a model in mid-training."""
    generator = torch.Generator().manual_seed(0)
    x = normalize(torch.randn(n, d, generator=generator), dim=1)
    y = normalize(x + normalize(torch.randn(n, d, generator=generator), dim=1), dim=1)
    return x, y


def step(function: Callable[[Tensor, Tensor], Tensor], trains: bool, x: Tensor, y: Tensor) -> list[Tensor]:
    """The result, and where it trains the gradients."""
    if not trains:
        with torch.no_grad():
            return [function(x, y)]
    leaves = [v.detach().requires_grad_() for v in (x, y)]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def check(comparison: Comparison, x: Tensor, y: Tensor) -> float:
    """The largest relative difference between ours and the dense formula; for draws, whether they are legal."""
    ours, dense = (step(f, comparison.trains, x, y) for f in (comparison.ours, comparison.dense))
    if comparison.trains:
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, dense, strict=True))
    if comparison.name == "sampled negatives":
        return float((ours[0] == torch.arange(len(x))).any())
    # a rank may differ by near ties, which the dense formula decides by its rounding
    return float((ours[0] != dense[0]).double().mean()) / 10


def measure(comparison: Comparison, x: Tensor, y: Tensor, rounds: int) -> tuple[float, float]:
    """Best seconds of ours and of the dense formula."""
    functions = (comparison.ours, comparison.dense)
    works = [Work(lambda f=f: step(f, comparison.trains, x, y), "cpu") for f in functions]  # type: ignore[misc]
    for work in works:
        warm_up(work)
    interleave(works, rounds)
    return works[0].best, works[1].best


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where something is wrong or a promise is not kept."""
    parser = argparse.ArgumentParser(prog="python -m bench.structures", description=__doc__)
    parser.add_argument("--n", type=int, default=8192, help="samples")
    parser.add_argument("--d", type=int, default=256, help="features")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only what has this in its name")
    options = parser.parse_args(arguments)
    x, y = make_features(options.n, options.d)
    promised = (options.n, options.d) == (8192, 256)
    table = Table(title=f"N = {options.n:,}, D = {options.d}, float32; {describe_machine('cpu')}", title_justify="left")
    for name in ("", "ours, ms", "dense, ms", "faster", "promised"):
        table.add_column(name, justify="left" if not name else "right")
    failed = False
    for comparison in comparisons():
        if options.only not in comparison.name:
            continue
        error = check(comparison, *make_features(min(options.n, 1500), options.d))
        if error > TOLERANCE:
            table.add_row(comparison.name, "wrong", f"{error:.1e}", "", "")
            failed = True
            continue
        ours, dense = measure(comparison, x, y, options.rounds)
        kept = dense / ours >= comparison.target
        failed |= promised and not kept
        verdict = f"{comparison.target:g}x, {'kept' if kept else 'not kept'}" if promised and comparison.target else ""
        what = f"{comparison.name}, forward{' + backward' * comparison.trains}"
        table.add_row(what, milliseconds(ours), milliseconds(dense), f"{dense / ours:.1f}x", verdict)
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
