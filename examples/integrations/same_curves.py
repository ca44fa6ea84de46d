"""Train small models of other libraries twice, with their own losses and with ``contrastive_kernels.integrations``.

    python examples/integrations/same_curves.py                    every library that is installed
    python examples/integrations/same_curves.py lightly_moco

Same seeds, same data: the curves agree to rounding. Prints the largest difference of each; 1 if one is above 1e-4.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

STEPS, ROWS = 40, 64
#: Largest difference of two curves in float32.
ALLOWED = 1e-4

Curve = list[float]


def pictures(count: int, classes: int = 16) -> tuple[Tensor, Tensor]:
    """Drawn pictures [count, 1, 16, 16] of bars, one position and slope a class; and their classes."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (count,), generator=g)
    row = torch.arange(16, dtype=torch.float32)
    middle = 2 + 3 * (label % 4)[:, None] + ((label // 4)[:, None] - 1.5) * (row - 8) / 4
    drawn = torch.exp(-((row[None, None] - middle[:, :, None]) ** 2) / 2)
    return (drawn + 0.2 * torch.randn(count, 16, 16, generator=g))[:, None], label


def encoder() -> nn.Sequential:
    """Pictures to features [n, 32]."""
    layers = (nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 32))


def trained(
    model: nn.Module, step: Callable[[Tensor, Tensor], Tensor], after: Callable[[], None] | None = None
) -> Curve:
    """The losses of some steps."""
    optimizer, curve = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    images, labels = pictures(ROWS * STEPS)
    for batch, label in zip(images.split(ROWS), labels.split(ROWS), strict=True):
        optimizer.zero_grad()
        loss = step(batch, label)
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        curve.append(loss.item())
    return curve


def view(batch: Tensor) -> Tensor:
    """Another view of pictures."""
    return batch + 0.3 * torch.randn_like(batch)


def lightly_simclr() -> Curve:
    """SimCLR: two views."""
    loss, model = importlib.import_module("lightly.loss").NTXentLoss(temperature=0.2), encoder()
    return trained(model, lambda batch, _: loss(model(view(batch)), model(view(batch))))


def lightly_moco() -> Curve:
    """MoCo: keys of a momentum encoder, and a memory bank."""
    loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(512, 32))
    model, momentum = encoder(), encoder()
    momentum.load_state_dict(model.state_dict())

    def step(batch: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            keys = momentum(view(batch))
        found: Tensor = loss(model(view(batch)), keys)
        return found

    @torch.no_grad()
    def after() -> None:
        for slow, fast in zip(momentum.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.05)

    return trained(model, step, after)


def metric_learning_labels() -> Curve:
    """Labelled pictures: many positives of an anchor."""
    loss, model = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=0.2), encoder()
    return trained(model, lambda batch, label: loss(model(batch), label))


def metric_learning_memory() -> Curve:
    """The same beside a memory of earlier batches."""
    losses, model = importlib.import_module("pytorch_metric_learning.losses"), encoder()
    memory = losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.2), 32, memory_size=512)
    return trained(model, lambda batch, label: memory(model(batch), label))


def metric_learning_sup_con() -> Curve:
    """Labelled pictures, supervised contrastive."""
    loss, model = importlib.import_module("pytorch_metric_learning.losses").SupConLoss(temperature=0.2), encoder()
    return trained(model, lambda batch, label: loss(model(batch), label))


def open_clip_pairs() -> Curve:
    """Pictures and their classes' vectors, by the loss of open_clip's factory."""
    arguments = {"distill": False, "model": "small", "siglip": False, "local_loss": False, "gather_with_grad": False}
    arguments |= {"rank": 0, "world_size": 1, "horovod": False}
    loss = importlib.import_module("open_clip").create_loss(type("Arguments", (), arguments))
    model = nn.ModuleDict({"image": encoder(), "text": nn.Embedding(16, 32)})

    def step(batch: Tensor, label: Tensor) -> Tensor:
        image, text = (normalize(v, dim=1) for v in (model["image"](batch), model["text"](label)))
        found: Tensor = loss(image, text, logit_scale=10.0, output_dict=True)["contrastive_loss"]
        return found

    return trained(model, step)


def sentence_transformers_cached() -> Curve:
    """A model of words, with dropout, through a cached loss of mini-batches."""
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")

    class Words(nn.Sequential):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": super().forward(inputs["input_ids"]).mean(1)}

    model = Words(nn.Embedding(64, 32), nn.Dropout(0.1), nn.Linear(32, 32))
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=16)

    def step(_: Tensor, label: Tensor) -> Tensor:
        words = 4 * label[:, None] + torch.randint(4, (2, len(label), 5))
        found: Tensor = loss([{"input_ids": column} for column in words], None)
        return found

    return trained(model, step)


def sentence_transformers_trainer() -> Curve:
    """Sentences of numbered words, by SentenceTransformerTrainer; the model is made here and not downloaded."""
    package = importlib.import_module("sentence_transformers")
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    datasets = importlib.import_module("datasets")
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, **{f"w{k}": k + 1 for k in range(64)}}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = modules.StaticEmbedding(tokenizer, embedding_dim=32)
    model = package.SentenceTransformer(modules=[words, modules.Normalize()], device="cpu")
    _, labels = pictures(ROWS * STEPS)
    drawn = (4 * labels[:, None] + torch.randint(4, (2, len(labels), 5))).tolist()
    columns = ([" ".join(f"w{k}" for k in words) for words in column] for column in drawn)
    data = datasets.Dataset.from_dict(dict(zip(("query", "document"), columns, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        how = package.SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=STEPS, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", learning_rate=3e-2, disable_tqdm=True,
        )  # fmt: skip
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = package.SentenceTransformerTrainer(model, how, train_dataset=data, loss=loss)
        trainer.remove_callback(importlib.import_module("transformers").PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def transformers_trainer() -> Curve:
    """A small CLIP made from a config, by transformers' Trainer, whose step has no matrix of logits with ours."""
    transformers = importlib.import_module("transformers")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": 20,
        "max_position_embeddings": 4,
        "eos_token_id": 19,
        "bos_token_id": 18,
        "pad_token_id": 17,
    }
    vision = {**size, "image_size": 16, "patch_size": 4, "num_channels": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = transformers.CLIPModel(config)
    images, labels = pictures(ROWS * STEPS)
    ids = torch.stack([labels, torch.full_like(labels, 19)], 1)
    data = [{"input_ids": i, "pixel_values": p, "return_loss": True} for i, p in zip(ids, images, strict=True)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("input_ids", "pixel_values")
        return {**{name: torch.stack([row[name] for row in rows]) for name in names}, "return_loss": True}

    with tempfile.TemporaryDirectory() as folder:
        how = transformers.TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=STEPS, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", learning_rate=1e-3, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, how, train_dataset=data, data_collator=collate)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


PROGRAMS: dict[str, Callable[[], Curve]] = {
    "lightly_simclr": lightly_simclr,
    "lightly_moco": lightly_moco,
    "metric_learning_labels": metric_learning_labels,
    "metric_learning_memory": metric_learning_memory,
    "metric_learning_sup_con": metric_learning_sup_con,
    "open_clip_pairs": open_clip_pairs,
    "sentence_transformers_cached": sentence_transformers_cached,
    "sentence_transformers_trainer": sentence_transformers_trainer,
    "transformers_trainer": transformers_trainer,
}


def compare(name: str) -> float | None:
    """The largest difference between the two curves of a program; None where its library is missing."""
    library = next(each for each in LIBRARIES if name.startswith(each))
    try:
        ours = importlib.import_module(f"contrastive_kernels.integrations.{library}")
    except ImportError as error:
        print(f"{name}: left out, {error}")
        return None
    curves = []
    for context in (nullcontext(), ours.patched()):
        torch.manual_seed(0)
        with context:
            curves.append(PROGRAMS[name]())
    theirs, mine = curves
    off = max(abs(a - b) for a, b in zip(theirs, mine, strict=True))
    print(f"{name}: {theirs[0]:.4f} to {theirs[-1]:.4f} in {len(theirs)} steps, largest difference {off:.1e}")
    return off


LIBRARIES = ("lightly", "metric_learning", "open_clip", "sentence_transformers", "transformers")


def main(names: list[str]) -> int:
    """Compares what is named, or all."""
    if unknown := set(names) - set(PROGRAMS):
        print(f"expected some of {', '.join(PROGRAMS)}; got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    found = [compare(name) for name in names or PROGRAMS]
    return int(any(off is not None and not off <= ALLOWED for off in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
