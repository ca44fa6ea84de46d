"""The latent-structure experiment on a small part of its data: labels, splits, models, and the command end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for module in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import fusion  # noqa: E402
import fusion_tasks  # noqa: E402
import glyphs  # noqa: E402
import probes  # noqa: E402
import structured_towers  # noqa: E402
import structures  # noqa: E402
import structures_report  # noqa: E402
import tasks  # noqa: E402
import transformer  # noqa: E402
import unicode_scripts  # noqa: E402
import views  # noqa: E402

FACES = (0, 7, 8, 12)  # sans; serif bold italic; mono; STIX
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four faces of some 1,200 letters with and without marks, arrows and operators."""
    whole = glyphs.load_glyphs(tmp_path_factory.mktemp("cache"), faces=FACES, progress=False)
    numbers = whole.codepoints
    return whole.subset(characters=np.flatnonzero((numbers < 0x250) | (numbers > 0x1E00) & (numbers < 0x2240)))


# Labels


@pytest.mark.parametrize(
    ("character", "base", "marks"),
    [("é", "e", 1), ("ế", "e", 2), ("Ǻ", "A", 2), ("x", "x", 0), ("й", "и", 1), ("→", "→", 0)],
)
def test_marks(character, base, marks):
    found = tasks.base_and_marks(ord(character))
    assert (found[0], len(found[1])) == (base, marks)


@pytest.mark.parametrize(
    ("shown", "claimed", "hidden", "expected"),
    [
        ("é", "é", None, "ENTAILS"), ("é", "e", None, "ENTAILS"), ("e", "é", None, "CONTRADICTS"),
        ("é", "è", None, "CONTRADICTS"), ("é", "è", "above", "NEUTRAL"), ("é", "é", "above", "NEUTRAL"),
        ("é", "é", "below", "ENTAILS"), ("ȩ", "ȩ", "below", "NEUTRAL"), ("é", "ȩ", "below", "NEUTRAL"),
        ("é", "ȩ", "above", "CONTRADICTS"), ("é", "á", "above", "CONTRADICTS"), ("ậ", "ạ", "above", "ENTAILS"),
        ("ậ", "ậ", "above", "NEUTRAL"), ("É", "é", None, "CONTRADICTS"),
    ],
)  # fmt: skip
def test_what_a_picture_says_about_a_claim(shown, claimed, hidden, expected):
    assert tasks.relation(ord(shown), ord(claimed), hidden) == expected


def test_hiding_takes_the_mark_and_leaves_the_letter(data):
    def picture(character):
        return data.images[data.first[data.codepoints.tolist().index(ord(character))]]

    assert not np.array_equal(picture("é"), picture("e"))
    assert np.array_equal(tasks.hide(picture("é"), "above"), tasks.hide(picture("e"), "above"))
    assert np.array_equal(tasks.hide(picture("ẹ"), "below"), tasks.hide(picture("e"), "below"))
    assert np.array_equal(tasks.hide(picture("ẹ"), "below")[:25], picture("ẹ")[:25])
    assert (tasks.hide(picture("ẹ"), "below")[25:] == tasks.GREY).all()
    assert np.array_equal(tasks.hide(picture("é"), None), picture("é"))


def test_faces_and_categories():
    assert tasks.attribute("bold", np.array(FACES)).tolist() == [False, True, False, False]
    assert tasks.attribute("italic", np.array(FACES)).tolist() == [False, True, False, False]
    assert tasks.attribute("serif", np.array(FACES)).tolist() == [False, True, False, True]
    assert tasks.attribute("mono", np.array(FACES)).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="name: expected one of"):
        tasks.attribute("oblique", np.array(FACES))
    codes = {c: tasks.CATEGORIES[tasks.category_index(ord(c))].code for c in "Aж5→+(€"}
    assert codes == {"A": "Lu", "ж": "Ll", "5": "Nd", "→": "Sm", "+": "Sm", "(": "Ps", "€": "Sc"}
    assert set(tasks.DEJAVU).isdisjoint(tasks.STIX)
    assert len(tasks.DEJAVU) + len(tasks.STIX) == len(glyphs.FACES)


# Questions


def truth(data, kind, text, characters, row_faces):
    """A question's answer by another way than the one that drew it."""
    names = [unicode_scripts.SCRIPTS[data.scripts[c]].name.upper() if data.scripts[c] >= 0 else "" for c in characters]
    subject = text.split()[-1].lower()
    if kind == "script":
        return names[0]
    if kind == "marks":
        return str(len(tasks.base_and_marks(int(data.codepoints[characters[0]]))[1]))
    if kind == "face":
        return "YES" if getattr(glyphs.FACES[row_faces[0]], subject) else "NO"
    if subject in tasks.ATTRIBUTES:
        holds = [getattr(glyphs.FACES[face], subject) for face in row_faces]
    else:
        holds = [text == f"BOTH ARE {name}" for name in names]
    return "TRUE" if all(holds) else "FALSE"


@pytest.mark.parametrize("kind", fusion_tasks.KINDS)
def test_questions_are_about_their_own_split_and_rightly_answered(data, kind):
    trained_on = data.subset(faces=tasks.DEJAVU)
    where = {image.tobytes(): row for row, image in enumerate(trained_on.images)}
    for split in ("train", "test"):
        own = set(trained_on.characters(split).tolist())
        asked = fusion_tasks.Questions(trained_on, split).draw(kind, 200, np.random.default_rng(0))
        assert asked.pictures.shape == (200, 2 if kind == "pairs" else 1, 32, 32)
        assert set(asked.characters.ravel().tolist()) <= own
        answers = [fusion_tasks.ANSWERS[a] for a in asked.answers]
        counts = np.unique(asked.answers, return_counts=True)[1]
        assert counts.max() < 2.5 * counts.mean(), "one answer is asked for far more often than others"
        if kind == "entailment":
            claims = {trained_on.captions[c] for c in own}
            assert {text.removeprefix("IT IS ") for text in asked.texts} <= claims
            continue
        for text, answer, pictures, characters in zip(asked.texts, answers, asked.pictures, asked.characters):
            rows = [where[picture.tobytes()] for picture in pictures]
            if all(trained_on.character[row] == c for row, c in zip(rows, characters)):  # not so for look-alikes
                faces = trained_on.face[rows]
                assert answer == truth(trained_on, kind, text, characters, faces), text


def test_questions_repeat_by_seed(data):
    questions = fusion_tasks.Questions(data, "train")
    first, again, other = (questions.draw("pairs", 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.texts == again.texts
    assert np.array_equal(first.pictures, again.pictures)
    assert first.texts != other.texts
    with pytest.raises(ValueError, match="kind: expected one of"):
        questions.draw("colour", 1, np.random.default_rng(0))


# Views and words


def test_caption_views_drop_words_and_repeat_by_step():
    texts = ["LATIN SMALL LETTER E WITH ACUTE", "ARROW"]
    made = []
    views.CaptionViews(texts, lambda versions: made.extend(versions) or transformer.Words([], None), 0.5, 0)
    assert len(made) == 2 * views.COPIES
    assert set(made[1::2]) == {"ARROW"}
    assert len(set(made[::2])) > 1
    for text in made[::2]:
        kept = text.split()
        assert 1 <= len(kept) <= 6
        assert [word for word in texts[0].split() if word in kept] == kept, "another order"


def test_pictures_for_separation_are_parts_of_all_faces_of_a_character(data, monkeypatch):
    characters = glyphs.BatchSampler(data, 21)[0].characters
    expected = np.concatenate([data.images[data.first[c] : data.first[c + 1]] for c in characters])[:21]
    first, second = (part.numpy() for part in views.all_faces(data, characters, 21, 3, seed=0, max_shift=0))
    assert np.array_equal(views.all_faces(data, characters, 21, 3, seed=0, max_shift=0)[1].numpy(), second)
    assert not np.array_equal(first, second), "both views show the same part"
    for part in (first, second):
        for picture, whole in zip(part, expected):
            assert any(
                np.array_equal(picture[top : top + views.WINDOW, left : left + views.WINDOW], inside)
                and picture.sum() == inside.sum()
                for top in range(33 - views.WINDOW)
                for left in range(33 - views.WINDOW)
                for inside in [whole[top : top + views.WINDOW, left : left + views.WINDOW]]
            )
    monkeypatch.setattr(views, "WINDOW", 32)  # all of it: only moved
    moved = [part.numpy() for part in views.all_faces(data, characters, 21, 3, seed=0, max_shift=1)]
    assert not np.array_equal(*moved)
    down, right = np.divmod(np.arange(9), 3)
    for pictures in moved:
        for picture, before in zip(pictures, expected):
            candidates = glyphs.shift(np.repeat(before[None], 9, axis=0), down - 1, right - 1)
            assert (candidates == picture).all(axis=(1, 2)).any()


def test_rare_words_are_spelt():
    vocabulary = transformer.Vocabulary(["SMALL LETTER ZHE", "SMALL LETTER A", "SMALL LETTER B"])
    read = lambda text: [vocabulary.tokens[i] for i in vocabulary.encode(text)]  # noqa: E731
    assert read("SMALL LETTER ZHE") == ["<start>", "SMALL", "LETTER", "Z", "H", "E"]
    assert read("DOTS-12") == ["<start>", "D", "O", "T", "S", "1", "2"]
    tokens, lengths = transformer.Words(["SMALL A", "SMALL LETTER B"], vocabulary)[torch.tensor([1, 0])]
    assert tokens.shape == (2, 4)
    assert lengths.tolist() == [4, 3]
    assert tokens[1, 3] == transformer.PAD


def test_padding_changes_nothing():
    torch.manual_seed(0)
    vocabulary = transformer.Vocabulary(["SMALL LETTER A"] * 3)
    tower = transformer.WordTower(vocabulary, dim=8, width=16).eval()
    words = transformer.Words(["SMALL A", "SMALL LETTER A A A A"], vocabulary)
    alone, _ = words[torch.tensor([0])]
    torch.testing.assert_close(tower((alone, None))[0], tower(words.all())[0])


# Probes


def test_top_k_is_balanced_and_counts_ties_against_the_model():
    truth = torch.tensor([0, 0, 1, 2])
    scores = torch.tensor([3.0, 2, 1]).repeat(4, 1)
    assert probes.top_k(scores, truth, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert probes.top_k(torch.ones(4, 3), truth, (1, 3)) == {1: 0.0, 3: 1.0}


def test_linear_probe_finds_a_line_and_nothing_in_noise():
    torch.manual_seed(0)
    x = torch.randn(2000, 6)
    truth = (x[:, 2] > 1).long()  # one in six: classes weigh the same
    learnt = probes.top_k(probes.linear_probe(x[:1000], truth[:1000], 2)(x[1000:]), truth[1000:], (1,))[1]
    assert learnt > 0.9
    noise = torch.randint(2, (2000,))
    assert (
        abs(probes.top_k(probes.linear_probe(x[:1000], noise[:1000], 2)(x[1000:]), noise[1000:], (1,))[1] - 0.5) < 0.06
    )


def test_gap_is_the_distance_of_the_centres():
    image, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[-1.0, 0], [0, 1]])
    assert probes.gap(image, text) == 1.0


def test_interval():
    mean, half = structures_report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
    assert np.isnan(structures_report.interval([1.0])[1])


# Models


def test_queue_holds_the_latest_and_hides_a_batch_from_itself():
    queue = fusion.Queue(4, 2, torch.device("cpu"))
    rows = torch.arange(6.0).repeat(2, 1).T
    queue.push(rows[:3], -rows[:3], torch.tensor([10, 11, 12]))
    own = torch.full((1, 2), 9.0)
    assert queue.beside(own, 0, torch.tensor([11]))[:, 0].tolist() == [9, 0, 2]
    queue.push(rows[3:], -rows[3:], torch.tensor([13, 14, 15]))
    assert sorted(queue.beside(own, 1, torch.tensor([99]))[1:, 0].tolist()) == [-5, -4, -3, -2]


def test_momentum_follows():
    model = torch.nn.Linear(1, 1, bias=False)
    slow = structured_towers.Momentum(model, 0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    slow.follow(model)
    torch.testing.assert_close(slow.model.weight, before + 0.1)
    assert not slow.model.weight.requires_grad


TOWERS = structured_towers.TowerSettings(
    batch=96, steps=6, dim=16, hidden=32, separation=0.1, bridge=0.1, geometry=0.02
)


@pytest.mark.parametrize("options", [{}, {"text": "transformer"}, {"momentum": 0.9}], ids=str)
def test_towers_learn_with_every_option(data, options):
    trainer = structured_towers.TowerTrainer(dataclasses.replace(TOWERS, **options), data)
    terms = []
    for _ in range(TOWERS.steps):
        trainer.train_step()
        terms.append(trainer.terms)
    assert terms[-1]["loss"] < terms[0]["loss"]
    assert set(terms[0]) >= {"base", "separation", "bridge", "geometry"}
    image, independent = trainer.model.image_features(torch.from_numpy(data.images[:5]))
    for features in (image, independent):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_fusion_model_reads_the_picture_and_the_question(data):
    torch.manual_seed(0)
    settings = fusion.FusionSettings(batch=32, steps=3, width=32, dim=16, queue=64, separation=0.1)
    trainer = fusion.FusionTrainer(settings, data)
    for _ in range(settings.steps):
        trainer.train_step()
    assert np.isfinite([float(loss) for loss in trainer.losses]).all()
    assert trainer.objective.queue.filled == 64
    answerer = fusion_tasks.Answerer(trainer.model).eval()
    pictures = torch.from_numpy(data.images[:2])[:, None]
    tokens = [trainer.model.prepare_captions([text]).all()[0] for text in ("IS IT BOLD", "IS IT MONO")]
    one, other = (answerer(pictures, t.repeat(2, 1)) for t in tokens)
    assert not torch.allclose(one, other), "the question is not read"
    assert not torch.allclose(one[0], one[1]), "the picture is not seen"
    pair = torch.from_numpy(data.images[:2])[None]
    answerer.which.data.normal_()
    swapped = answerer(pair.flip(1), tokens[0])
    assert not torch.allclose(answerer(pair, tokens[0]), swapped), "which picture is which cannot be told"


def test_statistics_of_parts_are_not_kept():
    layer = torch.nn.BatchNorm1d(2)
    x = torch.randn(8, 2) + 5
    with structured_towers.statistics_kept(torch.nn.Sequential(layer)):
        inside = layer(x)
    assert layer.running_mean.tolist() == [0, 0]
    torch.testing.assert_close(inside, layer(x))
    assert (layer.running_mean > 0).all()


FUSION = fusion.FusionSettings(batch=32, steps=3, width=32, dim=16, queue=64)


@pytest.mark.parametrize(
    ("trainer", "settings"), [(structured_towers.TowerTrainer, dataclasses.replace(TOWERS, bridge=0.0, geometry=0.0)),
                              (fusion.FusionTrainer, FUSION)], ids=["towers", "fusion"]
)  # fmt: skip
def test_separation_leaves_temperature_and_running_means_to_the_base(data, trainer, settings):
    found = []
    for weight in (0.0, 0.3):
        run = trainer(dataclasses.replace(settings, separation=weight), data)
        run.train_step()
        kept = {name: value for name, value in run.model.named_buffers() if "running" in name}
        found.append({**kept, "temperature": run.model.log_logit_scale.grad})
    assert len(found[0]) > 2
    assert found[0]["temperature"] != 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_variants_by_name_and_by_weight():
    assert structured_towers.structure_of("+ all") == structured_towers.VARIANTS["+ all"]
    assert structured_towers.structure_of("geometry=0.5") == structured_towers.Structure(geometry=0.5)
    for wrong in ("+ none", "geometry=much", "colour=1", "", "bridge=-1", "bridge=nan", "bridge=inf"):
        with pytest.raises(ValueError, match="variant: expected one of"):
            structured_towers.structure_of(wrong)


def test_faces_are_asked_of_letters_that_every_face_has(data):
    told = np.flatnonzero(tasks.tells_face(data))
    assert len(told) > 100
    for c in told:
        assert data.categories[c].startswith("L")
        assert data.first[c + 1] - data.first[c] == len(FACES)


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="text: expected one of"):
        structured_towers.TowerSettings(text="lstm")
    with pytest.raises(ValueError, match=r"momentum: expected a number in \[0, 1\)"):
        structured_towers.TowerSettings(momentum=1.0)
    with pytest.raises(ValueError, match="geometry: expected a number of at least 0, got -1"):
        structured_towers.TowerSettings(geometry=-1)
    with pytest.raises(ValueError, match="queue: expected at least a batch of 32 rows, got 31"):
        fusion.FusionSettings(batch=32, queue=31)


# The command


@pytest.fixture(scope="module")
def few(data):
    """Half of the letters, few versions of their names, few questions a step: all of this only takes time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(views, "COPIES", 2)
        patched.setattr(structures, "fine_tune", functools.partial(fusion_tasks.fine_tune, batch=32))
        yield data.subset(characters=np.flatnonzero((data.codepoints < 0x180) | (data.codepoints > 0x1F00)))


@pytest.fixture(scope="module")
def quick(few, tmp_path_factory):
    """Runs the command; --quick gives it one job. Its folder and what it printed."""
    out = tmp_path_factory.mktemp("quick")
    command = ["structures.py", "--quick", "--out", str(out), "--json", str(out / "all.json")]
    with pytest.MonkeyPatch.context() as patched, io.StringIO() as printed:
        patched.setattr(structures, "load_glyphs", lambda folder, faces: few)
        patched.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(printed):
            structures.main()
        return out, command, " ".join(printed.getvalue().split())


def test_quick_command(quick, few, monkeypatch, capsys):
    tmp_path, command, printed = quick
    for words in (
        "script top-1",
        "face, shared",
        "nearest, shared",
        "zero-shot and probes",
        "shift: new faces",
        "entailment",
        "By chance",
        "less base's",
    ):
        assert words in printed, words
    assert (tmp_path / "structures.png").read_bytes().startswith(PNG)
    cells = json.loads((tmp_path / "all.json").read_text())["cells"]
    assert [(cell["cell"]["model"], cell["cell"]["variant"]) for cell in cells] == [
        (model, variant) for model in structures.MODELS for variant in structured_towers.VARIANTS
    ]
    for cell in cells:
        has = set(cell["terms"]) & {"separation", "bridge", "geometry"}
        assert has == {name for name in ("separation", "bridge", "geometry") if cell["settings"][name]}
        if cell["cell"]["model"] == "towers":
            assert ("independent" in cell["face"]) == bool(cell["settings"]["separation"])

    # Again: every cell is there, so nothing is trained.
    monkeypatch.setattr(structures, "load_glyphs", lambda folder, faces: few)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(structures, "train", None)
    monkeypatch.setattr(structures, "draw_report", lambda path, results: None)  # seen above
    structures.main()
    assert "10 of 10" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--out: expected cells of these settings"):
        structures.run_cell(
            structures.Cell("towers", "base", 0), dataclasses.replace(structures.QUICK, split="validation"), few,
            tmp_path / "cells",
        )  # fmt: skip
    with pytest.raises(ValueError, match="--out: expected cells of these settings"):
        structures.run_cell(structures.Cell("towers", "base", 0), structures.Plan(), few, tmp_path / "cells")


@pytest.mark.parametrize("model", structures.MODELS)
def test_killed_cell_ends_as_if_it_had_not_been(quick, few, tmp_path, model):
    cell = structures.Cell(model, "+ all", 0)
    whole = json.loads((quick[0] / "cells" / f"{cell.name}.json").read_text())
    assert structures.run_cell(cell, structures.QUICK, few, tmp_path / "killed", until=1) is None
    assert (tmp_path / "killed" / cell.name / "checkpoint.pt").exists()
    torch.manual_seed(999)  # another process
    resumed = structures.run_cell(cell, structures.QUICK, few, tmp_path / "killed")
    for name in ("training_seconds", "measuring_seconds"):
        assert resumed.pop(name) > 0 < whole.pop(name)
    assert resumed == whole
    assert not (tmp_path / "killed" / cell.name).exists(), "the checkpoint outlives its cell"
