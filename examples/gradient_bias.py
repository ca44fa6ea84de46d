"""How far a minibatch's mean gradient lies from the gradient over the whole data set, and how much it scatters.

    python examples/gradient_bias.py --json gradient_bias.json --png gradient_bias.png

Two towers (``half_batch.py``) are trained for a moment and frozen: 8,192 pictures and their captions become features X
and Y. What has a gradient is a matrix M between them, z = scale * X M YT, at M = identity, so that the gradient of
InfoNCE over all pairs, each picture against the 8,191 other captions, can be had exactly. Batches are the parts of
random partitions; a batch's negatives stand for all 8,191.

Two scales: one at which the median CV^2 of exp(z) over a picture's negatives is about 2, where theory's leading term
-grad(CV^2) / 2B holds, and the one that the model was trained at. Bias and standard deviation are relative to the norm
of the full gradient.

Given u the loss is a sum over pairs, so that the mean gradient of the decomposable loss for a given memory is computed
without drawing batches; its bias is that mean over several memories. A biased estimate is compared, batch by batch,
with the one from the true normalisers, whose mean is the full gradient: their difference scatters far less than either.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from files import Mistake, write_figure, write_json
from glyphs import GlyphData, load_glyphs
from half_batch import LOGIT_SCALE, train_towers
from options import SEED, THREADS, Distinct, at_least, output_file, run
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from towers import Captions

import contrastive_kernels as ck

__all__ = ["Features", "Measurement", "measure"]

SAMPLES = 8192
BATCHES = (8, 16, 32, 64, 256, 1024, 4096)
SWEEPS = (1, 10, 100)
SOGCLR_STEP = 0.1
TRAINING = {"method": "conventional", "batch": 64, "seed": 0, "samples": 30_000}
STYLES = {
    "conventional": ("tab:blue", "-"),
    "same-batch u": ("tab:cyan", "--"),
    "SogCLR": ("tab:green", "-"),
    "decomposable, 1 sweep": ("tab:orange", "-"),
    "decomposable, 10 sweeps": ("tab:red", "-"),
    "decomposable, 100 sweeps": ("tab:purple", "-"),
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method at one batch size; bias and noise of its estimate relative to the full gradient."""

    scale: float
    cv2: float
    method: str
    batch: int
    bias: float
    bias_noise: float
    deviation: float


class Features:
    """Frozen features at one scale, and what their whole data set says: normalisers and the full gradient."""

    def __init__(self, x: Tensor, y: Tensor, scale: float) -> None:
        self.x, self.y, self.scale, self.others = x, y, scale, len(x) - 1
        self.scores = scale * x @ y.T
        self.positive = self.scores.diagonal().clone()
        self.scores.fill_diagonal_(-math.inf)
        log_sum = self.scores.logsumexp(1)
        self.log_sum = log_sum  # over all negatives [n]
        # sum_j exp(h_ij) (y_j - y_i), divided by sum_j exp(h_ij)
        self.pull = torch.softmax(self.scores, 1) @ y - y
        self.gradient = self.expected(self.log_z(log_sum))

    def log_z(self, log_sum: Tensor) -> Tensor:
        """log(1 + sum exp(h)) from the log of the sum of exp(z) over all negatives [...]."""
        return torch.nn.functional.softplus(log_sum - self.positive)

    def expected(self, log_z: Tensor) -> Tensor:
        """The mean gradient of the decomposable loss with normalisers log_z [n]: exact, no batch is drawn. [D, D]."""
        weight = torch.exp(self.log_sum - self.positive - log_z)
        return self.x.T @ (weight[:, None] * self.pull) / len(self.x)

    def cv2(self, rows: int = 1024) -> float:
        """The median over pictures of the squared coefficient of variation of exp(z) over negatives."""
        z = self.scores[:rows]
        return float((torch.logsumexp(2 * z, 1) - 2 * z.logsumexp(1)).exp().mul(self.others).sub(1).median())


def partition(n: int, batch: int, generator: torch.Generator) -> Tensor:
    """A random partition into batches [n / batch, batch]."""
    return torch.randperm(n, generator=generator).view(-1, batch)


def sweep(features: Features, batches: Tensor) -> Tensor:
    """The log of the mean of exp(z) over each sample's negatives in its batch [n]."""
    found = torch.empty(len(features.x))
    for part in batches.split(max(1, 2**20 // batches.shape[1] ** 2)):
        z = features.scale * features.x[part] @ features.y[part].transpose(1, 2)
        z.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        found[part] = z.logsumexp(2) - math.log(batches.shape[1] - 1)
    return found


def memories(features: Features, batch: int, count: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Normalisers log Z [n] after the sweeps, and SogCLR's log of the mean, from `count` independent memories."""
    n = len(features.x)
    for _ in range(count):
        averaged = ck.NormalizerMemory(n, directions=1, step=1.0)
        recent = ck.NormalizerMemory(n, directions=1, step=1.0, floor=SOGCLR_STEP)
        index, stored = torch.arange(n), {}
        for number in range(1, max(SWEEPS) + 1):
            found = sweep(features, partition(n, batch, generator))[:, None]
            averaged.update(index, found)
            recent.update(index, found)
            if number in SWEEPS:
                name = f"decomposable, {number} sweep{'s' * (number > 1)}"
                stored[name] = features.log_z(averaged.log_mean[:, 0].to(features.x) + math.log(features.others))
        yield {**stored, "SogCLR": recent.log_mean[:, 0].to(features.x) + math.log(features.others)}


class _Moments:
    """Mean and scatter of gradients [D, D] and of their differences from the unbiased ones."""

    def __init__(self) -> None:
        self.count, self.squares, self.difference_squares = 0, 0.0, 0.0
        self.sum, self.difference_sum = torch.zeros(()), torch.zeros(())

    def add(self, gradients: Tensor, unbiased: Tensor) -> None:
        """Batches of gradients [b, D, D]."""
        differences = gradients - unbiased
        self.count += len(gradients)
        self.sum, self.difference_sum = self.sum + gradients.sum(0), self.difference_sum + differences.sum(0)
        self.squares += float(gradients.square().sum())
        self.difference_squares += float(differences.square().sum())

    def deviation(self) -> float:
        """Root of the mean squared distance from the mean."""
        return math.sqrt(max(self.squares / self.count - float((self.sum / self.count).square().sum()), 0.0))

    def bias(self) -> tuple[float, float]:
        """Norm of the mean difference, less what its own noise adds, and that noise."""
        square = float((self.difference_sum / self.count).square().sum())
        noise = (self.difference_squares / self.count - square) / max(self.count - 1, 1)
        return math.sqrt(max(square - noise, 0.0)), math.sqrt(max(noise, 0.0))


def _batch_gradients(features: Features, part: Tensor, normalizers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients [b, D, D] of batches `part` [b, B] by each method; "true" is the unbiased one."""
    x, y = features.x[part], features.y[part]
    z = features.scale * x @ y.transpose(1, 2)
    z.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    own = z.logsumexp(2)
    pull = torch.softmax(z, 2) @ y - y
    own = own + math.log(features.others / (part.shape[1] - 1))
    positive = features.positive[part]
    log_z = {name: value[part] for name, value in normalizers.items()}
    sogclr = torch.logaddexp(log_z["SogCLR"] + math.log1p(-SOGCLR_STEP), own + math.log(SOGCLR_STEP))
    log_z["SogCLR"] = torch.nn.functional.softplus(sogclr - positive)
    log_z["conventional"] = torch.nn.functional.softplus(own - positive)
    log_z["true"] = features.log_z(features.log_sum)[part]
    log_z["same-batch u"] = log_z["conventional"] - ck.reference.draw_log_weights(own, 1.0, None)
    ratios = {name: torch.exp(own - positive - value) for name, value in log_z.items()}
    return {name: x.transpose(1, 2) @ (r[..., None] * pull) / part.shape[1] for name, r in ratios.items()}


def measure(features: Features, batch: int, seed: int = 0) -> list[Measurement]:
    """All methods at one batch size."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    n, norm = len(features.x), float(features.gradient.norm())
    moments = {name: _Moments() for name in STYLES}
    biases: dict[str, list[Tensor]] = {name: [] for name in STYLES if name.startswith("decomposable")}
    count = max(2, min(8, 512 // batch))
    for normalizers in memories(features, batch, count, generator):
        for name, found in biases.items():
            found.append(features.expected(normalizers[name]) - features.gradient)
        for _ in range(max(1, 64 // count) if batch <= 256 else 2):
            for part in partition(n, batch, generator).split(max(1, 2**20 // batch**2)):
                gradients = _batch_gradients(features, part, normalizers)
                for name, moment in moments.items():
                    moment.add(gradients[name], gradients["true"])
    cv2, rows = features.cv2(), []
    for name, moment in moments.items():
        bias, noise = moment.bias()
        if name in biases:
            mean = torch.stack(biases[name]).mean(0)
            square = float(torch.stack(biases[name]).sub(mean).square().sum()) / (count * (count - 1))
            bias, noise = math.sqrt(max(float(mean.square().sum()) - square, 0.0)), math.sqrt(square)
        deviation = moment.deviation()
        rows.append(Measurement(features.scale, cv2, name, batch, bias / norm, noise / norm, deviation / norm))
    return rows


def frozen_features(data: GlyphData, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features [samples, D] of pictures and of their captions, from towers trained for a moment."""
    if samples > len(data):
        raise Mistake(f"--samples: expected at most {len(data)}, one of each picture, got {samples}")
    towers, _ = train_towers(data, Captions(data.captions), **TRAINING)  # type: ignore[arg-type]
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:samples])
    with torch.no_grad():
        x = torch.cat([towers.encode_images(torch.from_numpy(data.images[r])) for r in np.array_split(rows, 8)])
        y = towers.encode_captions(Captions([data.captions[c] for c in data.character[rows]]).all())
    return x, y


def moderate_scale(x: Tensor, y: Tensor, cv2: float = 2.0) -> float:
    """The scale at which the median CV^2 is the given one, by bisection on an eighth of the pictures."""
    few = len(x) // 8
    low, high = 0.1, 100.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        z = middle * x[:few] @ y.T
        z.diagonal().fill_(-math.inf)
        value = (torch.logsumexp(2 * z, 1) - 2 * z.logsumexp(1)).exp().mul(len(y) - 1).sub(1).median()
        low, high = (middle, high) if value < cv2 else (low, middle)
    return middle


def summary(rows: Sequence[Measurement], scale: float) -> Table:
    """B times the bias, and the standard deviation, of one scale."""
    of_scale = [r for r in rows if r.scale == scale]
    batches = sorted({r.batch for r in of_scale})
    title = f"scale {scale:.1f}, median CV^2 {of_scale[0].cv2:.1f}: B * bias, and (standard deviation)"
    table = Table("method", *(f"B = {b}" for b in batches), title=title, title_justify="left")
    for name in STYLES:
        cells = []
        for batch in batches:
            r = next(r for r in of_scale if (r.method, r.batch) == (name, batch))
            below = "" if r.bias > 2 * r.bias_noise else "< "
            bias = max(r.bias, 2 * r.bias_noise) if below else r.bias
            cells.append(f"{below}{batch * bias:.3g} ({r.deviation:.2g})")
        table.add_row(name, *cells)
    return table


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """Bias and standard deviation against the batch size, log-log, a line of panels per scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scales = sorted({r.scale for r in rows})
    figure, axes = pyplot.subplots(len(scales), 2, figsize=(9.5, 3.4 * len(scales)), squeeze=False, sharex=True)
    for line, scale in zip(axes, scales):
        for name, (colour, style) in STYLES.items():
            of_name = sorted((r for r in rows if (r.scale, r.method) == (scale, name)), key=lambda r: r.batch)
            seen = [r for r in of_name if r.bias > 2 * r.bias_noise]
            unseen = [r for r in of_name if r not in seen]
            line[0].plot([r.batch for r in seen], [r.bias for r in seen], style, color=colour, marker="o", label=name)
            line[0].plot([r.batch for r in unseen], [2 * r.bias_noise for r in unseen], "v", color=colour, mfc="none")
            line[1].plot([r.batch for r in of_name], [r.deviation for r in of_name], style, color=colour, marker="o")
        cv2 = next(r.cv2 for r in rows if r.scale == scale)
        for axis, title in zip(line, ("bias (open: not above its noise)", "standard deviation of one batch")):
            axis.set(xscale="log", yscale="log", title=f"{title}\nscale {scale:.1f}, median CV² {cv2:.1f}")
            axis.title.set_size(9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("batch size")
    figure.tight_layout()
    write_figure(path, figure, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command: both scales, all batch sizes, tables, JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=at_least(2), nargs="+", action=Distinct, default=BATCHES)
    parser.add_argument("--samples", type=at_least(16), default=SAMPLES, help="a multiple of every batch size")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--threads", type=THREADS, default=torch.get_num_threads())
    parser.add_argument("--json", type=output_file, help="write a row per method, batch size and scale")
    parser.add_argument("--png", type=output_file, help="draw bias and standard deviation")
    arguments = parser.parse_args()
    if any(arguments.samples % batch for batch in arguments.batch):
        parser.error(f"--batch: expected divisors of {arguments.samples} of at least 2; got {arguments.batch}")
    torch.set_num_threads(arguments.threads)
    console, rows = Console(), list[Measurement]()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training the towers", total=2 * sum(b + 256 for b in arguments.batch))
        x, y = frozen_features(load_glyphs(progress=False), arguments.samples, arguments.seed)
        for scale in (moderate_scale(x, y), LOGIT_SCALE):
            features = Features(x, y, scale)
            for batch in arguments.batch:
                progress.update(task, description=f"scale {scale:.1f}, B = {batch}")
                rows += measure(features, batch, arguments.seed)
                progress.advance(task, batch + 256)
            del features
    for scale in sorted({r.scale for r in rows}):
        console.print(summary(rows, scale))
    if arguments.json:
        write_json(arguments.json, [dataclasses.asdict(r) for r in rows])
    if arguments.png:
        draw(rows, arguments.png)


if __name__ == "__main__":
    run(main)
