"""The examples on a small part of their data: the data set's promises, a short run of every loss, exact resumption."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for module in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import evaluate  # noqa: E402
import glyphs  # noqa: E402
import objectives  # noqa: E402
import towers  # noqa: E402
import train_clip  # noqa: E402
import unicode_scripts  # noqa: E402

import contrastive_kernels as ck  # noqa: E402

SANS, SERIF_BOLD_ITALIC = 0, 7
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    """Two faces of some 600 letters."""
    whole = glyphs.load_glyphs(cache, faces=(SANS, SERIF_BOLD_ITALIC), progress=False)
    return whole.subset(characters=np.flatnonzero(whole.codepoints < 0x400))


# The data set


def test_tables_fit_together(data):
    assert data.images.shape == (len(data), 32, 32)
    assert data.images.dtype == np.uint8
    assert data.images.any(axis=(1, 2)).all(), "a blank picture"
    assert np.all(np.diff(data.codepoints) > 0)
    assert np.all(np.diff(data.character) >= 0)
    assert set(data.character) == set(range(len(data.codepoints)))
    assert len({*zip(data.character.tolist(), data.face.tolist())}) == len(data), "a character twice in a face"
    assert set(data.face) == {SANS, SERIF_BOLD_ITALIC}
    for c in (0, 100, len(data.codepoints) - 1):
        assert np.all(data.character[data.first[c] : data.first[c + 1]] == c)
    assert data.first[-1] == len(data)


def test_captions_are_names_of_what_has_ink(data):
    for codepoint, caption, category in zip(data.codepoints, data.captions, data.categories):
        assert caption == unicodedata.name(chr(codepoint))
        assert not category.startswith("Z")
        assert category not in ("Cc", "Co", "Cs", "Cn")
    present = {chr(c) for c in data.codepoints}
    assert set("Aa7&éß") <= present
    assert present.isdisjoint({" ", "\t", "\u00a0"})


def test_glyphs_stand_on_one_line(data):
    def rows(character):
        row = data.first[data.codepoints.tolist().index(ord(character))]
        return np.flatnonzero(data.images[row].any(axis=1))

    assert rows("X")[-1] == rows("x")[-1] < rows("p")[-1]
    assert rows("X")[0] < rows("x")[0]
    assert rows("É")[0] < rows("E")[0]


def test_split_is_by_character_and_never_moves(data):
    parts = [set(data.characters(split).tolist()) for split in glyphs.SPLITS]
    assert set.union(*parts) == set(range(len(data.codepoints)))
    assert sum(map(len, parts)) == len(data.codepoints)
    assert 0.65 < len(parts[0]) / len(data.codepoints) < 0.85
    # By the number alone: neither the fonts that are there nor the rest of the set can move a character.
    one_face = data.subset(faces=[SANS])
    where = dict(zip(data.codepoints.tolist(), data.split.tolist()))
    assert all(where[c] == s for c, s in zip(one_face.codepoints.tolist(), one_face.split.tolist()))
    assert [where[ord(c)] for c in "ABCDEFGHIJ"] == [0, 0, 0, 0, 0, 0, 0, 2, 2, 0]
    with pytest.raises(ValueError, match="split: expected one of"):
        data.characters("dev")


def test_drawing_is_deterministic(data, cache, tmp_path):
    again = glyphs.load_glyphs(tmp_path, faces=[SANS], progress=False).subset(
        characters=np.arange(len(data.subset(faces=[SANS]).codepoints))
    )
    for name in ("images", "character", "codepoints"):
        assert np.array_equal(getattr(again, name), getattr(data.subset(faces=[SANS]), name)), name
    with pytest.raises(ValueError, match="faces: expected"):
        glyphs.load_glyphs(tmp_path, faces=[99])


def test_cache_is_read_and_a_damaged_one_is_not(tmp_path, monkeypatch):
    drawn = []
    small = glyphs.GlyphData(np.full((2, 32, 32), 7, np.uint8), np.array([0, 1]), np.array([0, 0]), np.array([65, 66]))
    monkeypatch.setattr(glyphs, "_draw", lambda *_: drawn.append(1) or small)
    load = lambda: glyphs.load_glyphs(tmp_path, faces=[SANS])  # noqa: E731

    load()
    (path,) = tmp_path.iterdir()  # one file, no leftovers
    assert np.array_equal(load().images, small.images)
    assert len(drawn) == 1, "the second call draws again"
    path.with_suffix(".part").write_bytes(b"half")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:500] + b"\0" * 100 + whole[600:]):
        path.write_bytes(damaged)
        before = len(drawn)
        assert np.array_equal(load().images, small.images)
        assert len(drawn) == before + 1, "a damaged file was used"
        assert path.read_bytes() == whole


def test_cache_of_a_killed_run_is_not_there(tmp_path, monkeypatch):
    small = glyphs.GlyphData(np.ones((1, 32, 32), np.uint8), np.array([0]), np.array([0]), np.array([65]))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        glyphs._write(tmp_path / "glyphs-0.npz", small)
    assert list(tmp_path.iterdir()) == []


def test_batches_hold_distinct_training_characters(data):
    sampler = glyphs.BatchSampler(data, 100, seed=3, views=2)
    training = set(data.characters("train").tolist())
    epoch = [sampler[step] for step in range(len(sampler))]
    for batch in epoch:
        assert batch.images.shape == (2, 100, 32, 32)
        assert len(set(batch.characters.tolist())) == 100
        assert set(batch.characters.tolist()) <= training
    assert len(set(np.concatenate([batch.characters for batch in epoch]).tolist())) == 100 * len(sampler)
    assert not np.array_equal(epoch[0].images[0], epoch[0].images[1]), "the views are the same"
    later = glyphs.BatchSampler(data, 100, seed=3, views=2)[7]
    assert np.array_equal(later.images, sampler[7].images)
    assert np.array_equal(later.characters, sampler[7].characters)
    assert not np.array_equal(glyphs.BatchSampler(data, 100, seed=4)[7].characters, later.characters)
    assert glyphs.BatchSampler(data, 10**6).batch == len(training)


def test_shift_moves_ink():
    image = np.zeros((3, 5, 5), np.uint8)
    image[:, 2, 2] = 9
    moved = glyphs.shift(image, np.array([1, -2, 2]), np.array([0, -2, 2]))
    assert [tuple(np.argwhere(picture)[0].tolist()) for picture in moved] == [(3, 2), (0, 0), (4, 4)]
    assert moved.sum() == 27


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("ж", "Cyrillic"), ("ß", "Latin"), ("Ω", "Greek"), ("→", "arrows"), ("≤", "mathematical operators"),
        ("ش", "Arabic"), ("א", "Hebrew"), ("Ա", "Armenian"), ("ა", "Georgian"), ("⠇", "Braille"),
        ("┼", "box drawing"), ("€", "currency signs"), ("\u0301", "combining marks"), ("𝔄", "mathematical letters"),
        ("Ⅷ", "numbers"), ("▚", "block elements"), ("!", "punctuation"), ("⑦", "circled"),
    ],
)  # fmt: skip
def test_scripts(character, script):
    assert unicode_scripts.SCRIPTS[unicode_scripts.script_index(ord(character))].name == script


# Towers and scores


def test_captions_are_hashed_alike_alone_and_in_a_batch():
    captions = towers.Captions(["LATIN SMALL LETTER A", "ARROW", "BRAILLE PATTERN DOTS-12"])
    grams, start = captions[torch.tensor([2, 0])]
    alone = [towers.Captions([text]).all()[0] for text in ("BRAILLE PATTERN DOTS-12", "LATIN SMALL LETTER A")]
    assert torch.equal(grams, torch.cat(alone))
    assert start.tolist() == [0, len(alone[0])]


def test_ranks_count_ties_and_nan_against_the_model():
    x = torch.eye(4)
    assert evaluate.ranks(x, x).tolist() == [0, 0, 0, 0]
    assert evaluate.ranks(x, x.flip(0)).tolist() == [3, 3, 3, 3]
    assert evaluate.ranks(torch.ones(4, 2), torch.ones(4, 2)).tolist() == [3, 3, 3, 3]
    assert evaluate.ranks(x * torch.nan, x).tolist() == [3, 3, 3, 3]


# Training

SETTINGS = train_clip.Settings(batch=96, steps=8, dim=32, lr=5e-3)


def run(loss, data, steps=None):
    trainer = train_clip.Trainer(dataclasses.replace(SETTINGS, loss=loss), data)
    train_clip.train(trainer, until=steps)
    return trainer


@pytest.fixture(scope="module")
def finished(data):
    return {loss: run(loss, data) for loss in objectives.LOSSES}


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_every_loss_learns(finished, loss):
    curve = finished[loss].curve()["loss"]
    assert len(curve) == SETTINGS.steps
    assert np.isfinite(curve).all()
    assert curve[-1] < 0.9 * curve[0]


def test_fused_run_is_the_dense_run(finished):
    fused, dense = (finished[loss].curve() for loss in ("clip", "dense"))
    for name in fused:
        np.testing.assert_allclose(fused[name], dense[name], rtol=2e-4)


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_resumed_run_is_the_uninterrupted_run(finished, data, tmp_path, loss):
    path = tmp_path / "checkpoint.pt"
    run(loss, data, steps=3).save(path)
    path.with_suffix(".part").write_bytes(b"what a kill during the next save leaves")
    torch.manual_seed(999)  # another process
    resumed = train_clip.start(data, {"loss": loss}, path, True, "cpu")
    assert resumed.step == 3
    train_clip.train(resumed)
    whole = finished[loss]
    assert resumed.curve() == whole.curve()
    for (name, ours), theirs in zip(resumed.model.state_dict().items(), whole.model.state_dict().values()):
        assert torch.equal(ours, theirs), name
    for name, value in resumed.objective.state_dict().items():
        assert torch.equal(value, whole.objective.state_dict()[name]), name
    with pytest.raises(ValueError, match="--resume: expected the settings"):
        train_clip.start(data, {"batch": 7}, path, True, "cpu")


def test_decomposable_remembers_every_character():
    torch.manual_seed(0)
    model = towers.TwoTowers(dim=8)
    x, y = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    objective = objectives.make_objective("decomposable", 10)
    characters = torch.tensor([1, 3, 5, 7, 8, 9])
    loss = ck.DecomposableContrastiveLoss(10, weights="updated", floor=0.6)
    for scale in (0.0, 0.3):  # of the second batch, the first one's normalisers are stored
        x = torch.nn.functional.normalize(x + scale, dim=1)
        want = loss(x, y, characters, model.logit_scale)
        torch.testing.assert_close(objective(model, x, y, characters), want)
    state = objective.state_dict()
    assert any(torch.equal(value, loss.memory.log_mean) for value in state.values())
    assert state["memory.visits"][:, 0].tolist() == [0, 2, 0, 2, 0, 2, 0, 2, 2, 2]


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="loss: expected one of"):
        train_clip.Settings(loss="hinge")
    with pytest.raises(ValueError, match="batch: expected a whole number of at least 1, got 0"):
        train_clip.Settings(batch=0)
    for wrong in ({"steps": -5}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup": 2.0}, {"seed": -1}, {"shift": 40}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            train_clip.Settings(**wrong)


# The commands


def test_train_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_clip, "load_glyphs", lambda folder: data)
    options = ["--steps", "4", "--batch", "64", "--dim", "16", "--device", "cpu", "--out"]
    command = ["train_clip.py", *options, str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    train_clip.main()
    printed = capsys.readouterr().out
    assert "recall@1" in printed
    assert "by chance" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["batch"] == 64
    assert len(metrics["curve"]["loss"]) == 4
    assert metrics["scores"]["test"]["candidates"] == len(data.characters("test"))
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    train_clip.main()
    assert "steps 4 to 4" in " ".join(capsys.readouterr().out.split())


def test_demo(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_glyphs", lambda folder: data)
    monkeypatch.setattr(demo, "CAPTIONS_SHOWN", 3)  # drawing is half of the time
    monkeypatch.setattr(demo, "HITS_SHOWN", 3)
    options = ["--batch", "128", "--steps", "6", "--compare", "4", "--sizes", "128", "256", "--out"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *options, str(tmp_path)])
    demo.main()
    assert "Largest difference of the loss over 4 steps" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "demo.json").read_text())
    assert [(cost["provider"], cost["rows"]) for cost in results["costs"]] == [
        (provider, rows) for rows in (128, 256) for provider in ("fused", "dense")
    ]
    for fused, dense in zip(results["costs"][::2], results["costs"][1::2]):
        assert fused["value"] == pytest.approx(dense["value"], rel=1e-5)
    for name in ("curves.png", "cost.png", "retrieval.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
