"""sentence-transformers' guided losses and these: the same values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against import assert_no_worse, features, value_and_gradients
from sentence_transformers.sentence_transformer import losses as theirs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from contrastive_kernels.integrations import sentence_transformers as ours


class Model(nn.Module):
    """What the losses ask of a model or a guide: tokens to embeddings, its tokenizer, and how it makes tokens."""

    def __init__(self, seed: int, words: int = 20) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(words, 6)
        vocabulary = {f"w{(k + seed * (words != 20)) % words}": k for k in range(words)} | {"[UNK]": words}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), unk_token="[UNK]"
        )
        self.max_seq_length = 8

    def __getitem__(self, k: int) -> Any:
        return self.table

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def preprocess(self, texts: list[str]) -> dict[str, Tensor]:
        vocabulary = self.tokenizer.get_vocab()
        return {"input_ids": torch.tensor([[vocabulary[w] for w in text.split()] for text in texts])}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.table(inputs["input_ids"]).mean(1)}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"margin": 0.1, "temperature": 0.05},
    {"margin": 0.05, "margin_strategy": "relative", "temperature": 0.1},
    {"contrast_anchors": False},
    {"contrast_positives": False, "margin": -0.2},
    {"contrast_anchors": False, "contrast_positives": False},
]


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_of_embeddings(options, columns):
    guide = [v.double() for v in features(9, count=columns, seed=7, unit=False)]

    def loss(module: Any) -> Any:
        of_embeddings = module.CachedGISTEmbedLoss(Model(0), Model(1), mini_batch_size=4, **options)
        return lambda *reps: of_embeddings.calculate_loss(
            [list(column.split(4)) for column in reps], [list(column.to(reps[0].dtype).split(4)) for column in guide]
        )

    batches = [features(9, count=columns, unit=False, seed=seed) for seed in range(8)]
    wide = [v.double() for v in batches[0]]
    found, wanted = (value_and_gradients(loss(module), wide) for module in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    # logits of up to 100 in float32: one batch is a throw of dice
    assert_no_worse(loss(ours), loss(theirs), batches, torch.float32, factor=2.0)


def columns_of(n: int, count: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(n)
    return [{"input_ids": torch.randint(20, (n, 4), generator=g)} for _ in range(count)]


@pytest.mark.parametrize("words", [20, 23], ids=["one vocabulary", "another vocabulary"])
@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("kind", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_a_step_of_a_model(kind, columns, words):
    found = []
    for module in (ours, theirs):
        model, guide = Model(0).double(), Model(1, words).double()
        loss = getattr(module, kind)(model, guide, temperature=0.1, margin=0.02)
        value = loss(columns_of(10, columns), None)
        value.backward()
        found.append([value.detach(), model.table.weight.grad])
        assert guide.table.weight.grad is None
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_patched():
    with ours.patched():
        from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

        assert (GISTEmbedLoss, CachedGISTEmbedLoss) == (ours.GISTEmbedLoss, ours.CachedGISTEmbedLoss)
