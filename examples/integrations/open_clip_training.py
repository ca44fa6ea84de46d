"""open_clip's own training program on drawn pictures, twice: with its losses, and with ``integrations.open_clip``.

    python examples/integrations/open_clip_training.py
    torchrun --nproc-per-node 2 examples/integrations/open_clip_training.py

Same seeds, same data: the towers end alike to rounding. Each run is one with other flags: clip, siglip, CoCa,
accumulation of two micro-batches; with torchrun local-loss with gather-with-grad, and neither. Wants
``open_clip_torch[training]``. Prints the largest difference of the trained parameters; 1 if one is above 1e-4.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train.main import main as train
from PIL import Image

from contrastive_kernels.integrations import open_clip as ours

PICTURES, BATCH, EPOCHS = 128, 32, 2
#: Largest difference of a parameter in float32, after the optimizer's division by the gradient's size.
ALLOWED = 1e-4

WORDS = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": WORDS,
}
SIGLIP = {**TOWERS, "init_logit_bias": -10, "init_logit_scale": 2.3}
COCA = {
    "embed_dim": 32,
    "vision_cfg": {**TOWERS["vision_cfg"], "output_tokens": True},
    "text_cfg": {**WORDS, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**WORDS, "attn_pooler_heads": 2},
    "custom_text": True,
}
MODELS = {"small-clip": TOWERS, "small-bias": SIGLIP, "small-coca": COCA}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50)}

CLIP = ["--model", "small-clip"]
ALONE = {
    "clip": CLIP,
    "siglip": ["--model", "small-bias", "--siglip"],
    "CoCa": ["--model", "small-coca"],
    "clip of two micro-batches": [*CLIP, "--accum-freq", "2"],
}
TOGETHER = {
    "clip": CLIP,
    "clip, local-loss and gather-with-grad": [*CLIP, "--local-loss", "--gather-with-grad"],
    "siglip": ["--model", "small-bias", "--siglip"],
}


class OnCPU(torch.nn.parallel.DistributedDataParallel):
    """Without the device's number, which open_clip's program gives and a CPU does not have."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


class Drawn(open_clip.coca_model.MultimodalTransformer):
    """With a projection to words that is drawn. open_clip's is whatever was in memory, NaN for some (open_clip#554)."""

    def __init__(self, width: int, *given: Any, **options: Any) -> None:
        super().__init__(width, *given, **options)
        torch.nn.init.normal_(self.text_projection, std=width**-0.5)


def joined_once(*given: Any, **options: Any) -> None:
    """Joins the ranks' group, which stays for the next run."""
    if not torch.distributed.is_initialized():
        INIT(*given, **options)


INIT = torch.distributed.init_process_group


def draw(folder: Path) -> Path:
    """Squares of some colours and places with their captions, as a table that open_clip reads."""
    random, lines = np.random.default_rng(0), ["filepath\ttitle"]
    for k in range(PICTURES):
        name = list(COLOURS)[k % len(COLOURS)]
        left, top = (int(v) for v in random.integers(0, 20, 2))
        pixels = random.integers(90, 140, (32, 32, 3), dtype=np.uint8)
        pixels[top : top + 12, left : left + 12] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{k}.png")
        lines.append(f"{folder / f'{k}.png'}\ta {name} square {left} from the left and {top} from the top")
    table = folder / "pictures.csv"
    table.write_text("\n".join(lines))
    return table


def trained(folder: Path, table: Path, name: str, flags: list[str], patched: bool) -> dict[str, Any]:
    """The parameters after a run of open_clip's program."""
    run = f"{name.replace(' ', '_')}_{'ours' if patched else 'theirs'}"
    told = ["--train-data", str(table), "--csv-separator", "\t", "--dataset-type", "csv"]
    told += ["--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--workers", "0", "--precision", "fp32"]
    told += ["--device", "cpu", "--dist-backend", "gloo", "--logs", str(folder), "--name", run, "--warmup", "2"]
    told += ["--lr", "1e-3", "--eps", "1e-3", "--save-frequency", str(EPOCHS)]
    with ours.patched() if patched else nullcontext():
        # the program has taken the factory's function by its name; what that makes is replaced in the factory
        train([*told, *flags])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    state: dict[str, Any] = torch.load(folder / run / "checkpoints" / f"epoch_{EPOCHS}.pt", weights_only=True)
    found: dict[str, Any] = state["state_dict"]
    return found


def main() -> int:
    """Compares all runs."""
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    bad = False
    torch.nn.parallel.DistributedDataParallel = OnCPU  # type: ignore[assignment, misc]
    torch.distributed.init_process_group = joined_once
    open_clip.coca_model.MultimodalTransformer = Drawn
    with tempfile.TemporaryDirectory() as scratch:
        # its checkpoints are written by one rank and read by all
        shared = f"{tempfile.gettempdir()}/open_clip_{os.environ.get('MASTER_PORT')}" if ranks > 1 else scratch
        folder = Path(shared) / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        for name, towers in MODELS.items():
            (folder / f"{name}.json").write_text(json.dumps(towers))
        open_clip.add_model_config(folder)
        table = draw(folder)
        for name, flags in (TOGETHER if ranks > 1 else ALONE).items():
            theirs, mine = (trained(Path(shared), table, name, flags, patched) for patched in (False, True))
            off = max(float((mine[key] - value).abs().max()) for key, value in theirs.items())
            bad |= not off <= ALLOWED
            if rank == 0:
                print(f"{name}: {len(theirs)} parameters on {ranks} ranks, largest difference {off:.1e}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
