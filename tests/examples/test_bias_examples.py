"""The experiments on the bias of minibatches, in small: what they measure is what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for module in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import glyphs  # noqa: E402
import gradient_bias  # noqa: E402
import half_batch  # noqa: E402
import memory_defaults  # noqa: E402
import synthetic  # noqa: E402
from towers import Captions  # noqa: E402

import contrastive_kernels as ck  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    whole = glyphs.load_glyphs(tmp_path_factory.mktemp("cache"), faces=(0,), progress=False)
    return whole.subset(characters=np.flatnonzero(whole.codepoints < 0x200))


def command(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def features(n=12, d=4, scale=6.0):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1) for _ in range(2))
    return gradient_bias.Features(x, y, scale)


# The known optimum


def test_the_known_optimum_is_reached_by_one_of_the_two():
    *_, results = synthetic.simulate(1.0, 16, 3, steps=800)
    finals = {m: [r.final for r in results if r.method == m] for m in synthetic.USUAL}
    assert all(abs(final - 1) < 0.05 for final in finals["decomposable"]), finals
    assert all(final > 1.1 for final in finals["conventional"]), finals


def test_synthetic_command(tmp_path, monkeypatch, capsys):
    out, png = tmp_path / "a" / "rows.json", tmp_path / "b" / "p.png"
    options = ["--noise", 0, 2, "--batch", 4, "--runs", 2, "--steps", 200, "--json", out, "--png", png]
    command(synthetic, monkeypatch, *options)
    rows = json.loads(out.read_text())
    assert {(r["noise"], r["method"]) for r in rows} == {
        *((0.0, m) for m in synthetic.USUAL),
        *((2.0, m) for m in synthetic.METHODS),
    }
    assert all(r["batch"] == 4 and math.isfinite(r["final"]) for r in rows) and len(rows) == 14
    assert {r["seed"] for r in rows} == {0, 1}
    assert png.read_bytes().startswith(PNG) and "bounded" in capsys.readouterr().out


# Bias of the gradient


def test_the_full_gradient_is_autograd_s():
    f = features()
    matrix = torch.eye(4, requires_grad=True)
    ck.reference.info_nce(f.x @ matrix, f.y, f.scale).backward()
    torch.testing.assert_close(f.gradient * f.scale, matrix.grad, rtol=1e-4, atol=1e-6)


def test_batch_gradients_are_the_library_s():
    f = features()
    parts = gradient_bias.partition(12, 4, torch.Generator().manual_seed(1))
    normalizers = next(gradient_bias.memories(f, 4, 1, torch.Generator().manual_seed(2)))
    ours = gradient_bias._batch_gradients(f, parts, normalizers)
    options = {
        "conventional": {"weights": "batch"},
        "SogCLR": {"weights": "updated", "floor": gradient_bias.SOGCLR_STEP},
        "decomposable, 10 sweeps": {},
        "true": {},
    }
    for name, chosen in options.items():
        loss = ck.DecomposableContrastiveLoss(12, directions=1, **chosen)
        if name == "SogCLR":
            stored = normalizers[name]
        else:
            log_z = f.log_z(f.log_sum) if name == "true" else normalizers["decomposable, 10 sweeps"]
            stored = log_z.expm1().log() + f.positive
        loss.memory.update(torch.arange(12), stored[:, None] - math.log(11))
        loss.memory.visits.fill_(100)
        for k, part in enumerate(parts):
            matrix = torch.eye(4, requires_grad=True)
            loss.eval()(f.x[part] @ matrix, f.y[part], part, f.scale).backward()
            torch.testing.assert_close(ours[name][k] * f.scale, matrix.grad, rtol=2e-3, atol=2e-5, msg=name)


def test_the_true_normalisers_are_unbiased_and_the_batch_s_own_are_not():
    f = features(64, scale=8.0)
    rows = {r.method: r for r in gradient_bias.measure(f, 8)}
    conventional, ours = rows["conventional"], rows["decomposable, 100 sweeps"]
    assert conventional.bias > 3 * conventional.bias_noise
    assert ours.bias + 2 * ours.bias_noise < conventional.bias / 3
    torch.testing.assert_close(f.expected(f.log_z(f.log_sum)), f.gradient)


def test_gradient_bias_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradient_bias, "load_glyphs", lambda progress: data)
    monkeypatch.setitem(gradient_bias.TRAINING, "samples", 640)
    out, png = tmp_path / "rows.json", tmp_path / "p.png"
    command(gradient_bias, monkeypatch, "--samples", 256, "--batch", 128, 256, "--json", out, "--png", png)
    rows = json.loads(out.read_text())
    assert {(r["method"], r["batch"]) for r in rows} == {(m, b) for m in gradient_bias.STYLES for b in (128, 256)}
    assert len({r["scale"] for r in rows}) == 2 and png.read_bytes().startswith(PNG)
    assert "B * bias" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(gradient_bias, monkeypatch, "--samples", 100, "--batch", 8)


# Half the batch


def test_rows_of_a_batch_do_not_see_one_another(data):
    torch.manual_seed(0)
    towers, captions = half_batch.Towers().train(), Captions(data.captions)
    images, rows = torch.from_numpy(data.images[:6]), torch.arange(6)
    x, y = towers(images, captions[rows])
    torch.testing.assert_close(towers(images[2:4], captions[rows[2:4]]), (x[2:4], y[2:4]))


def test_half_batch_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(half_batch, "load_glyphs", lambda progress: data)
    half_batch._data.cache_clear()
    out, png = tmp_path / "rows.json", tmp_path / "p.png"
    options = ["--batch", 32, "--seeds", 2, "--samples", 64, "--processes", 1, "--json", out, "--png", png]
    command(half_batch, monkeypatch, *options)
    rows = json.loads(out.read_text())
    wanted = set(half_batch.plan(32))
    assert {(r["method"], r["batch"]) for r in rows} == wanted and len(rows) == 2 * len(wanted)
    assert all(0 <= r["recall"] <= 1 and 0 <= r["zero_shot"] <= 1 for r in rows)
    assert png.read_bytes().startswith(PNG) and "difference" in capsys.readouterr().out
    command(half_batch, monkeypatch, *options, "--seeds", 1)  # what is there is not repeated
    assert len(json.loads(out.read_text())) == len(rows)
    half_batch._data.cache_clear()


def test_intervals_are_student_s():
    mean, width = half_batch.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and abs(width - 2.776 * math.sqrt(2.5 / 5)) < 0.01
    assert math.isnan(half_batch.interval([1.0])[1])


# Defaults of the memory, and a temperature that moves


@pytest.mark.parametrize("rescale", [False, True])
def test_a_warmed_up_temperature_and_what_the_memory_sees_of_it(data, monkeypatch, rescale):
    ratios, scales = [], []
    forward, follow = ck.DecomposableContrastiveLoss.forward, ck.NormalizerMemory.rescale
    monkeypatch.setattr(
        ck.DecomposableContrastiveLoss, "forward", lambda *a: (scales.append(float(a[4])), forward(*a))[1]
    )
    monkeypatch.setattr(ck.NormalizerMemory, "rescale", lambda m, ratio: (ratios.append(ratio), follow(m, ratio)))
    temperature = half_batch.Temperature(start=5.0, rescale=rescale)
    half_batch.train_towers(data, Captions(data.captions), "stored", 8, 0, 64, temperature)
    final = half_batch.LOGIT_SCALE
    expected = [5.0 * (final / 5.0) ** min(1.0, k / 4) for k in range(8)]  # eight steps
    assert scales == pytest.approx(expected, rel=1e-5)
    # from the towers' first scale to that of the first step, and from there to the last one
    assert ratios == (pytest.approx([5.0 / final] + [(final / 5.0) ** 0.25] * 4, rel=1e-5) if rescale else [])


def test_a_temperature_learns_where_it_shall(data):
    for temperature, moves in ((half_batch.FIXED, False), (half_batch.Temperature(learnable=True), True)):
        towers, _ = half_batch.train_towers(data, Captions(data.captions), "updated", 8, 0, 32, temperature)
        assert (abs(float(towers.logit_scale.detach()) - half_batch.LOGIT_SCALE) > 1e-3) is moves


def test_memory_defaults_command(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(half_batch, "load_glyphs", lambda progress: data)
    half_batch._data.cache_clear()
    out = tmp_path / "rows.json"
    options = ["--batch", 16, "--seeds", 2, "--samples", 16, "--processes", 1, "--json", out]
    command(memory_defaults, monkeypatch, *options)
    rows = json.loads(out.read_text())
    names = {(s.table, s.method, s.name) for s in memory_defaults.SETTINGS}
    assert len(names) == len(memory_defaults.SETTINGS), "two settings of one name"
    assert {(r["table"], r["run"]["method"], r["setting"]) for r in rows} == names and len(rows) == 2 * len(names)
    text = capsys.readouterr().out
    assert all(s.name in text for s in memory_defaults.SETTINGS)
    before = out.read_text()
    command(memory_defaults, monkeypatch, *options)  # what is there is not repeated
    assert out.read_text() == before
    half_batch._data.cache_clear()


def test_defaults_are_compared_with_the_first_setting_by_seed():
    def row(setting, seed, recall, method="stored"):
        run = half_batch.Run(method, 32, seed, 10, recall, 0.0, 0.0, None, 0.0)
        return memory_defaults.Row("options", setting, run)

    other = [row("b", 1, 0.5), row("b", 0, 0.25)]
    rows = [row("a", 0, 0.125), row("a", 1, 0.25), *other, row("c", 0, 1.0, "updated")]
    assert memory_defaults.paired(rows, other[0]) == [0.25, 0.125]
    assert memory_defaults.paired(rows, rows[-1]) == [0.0]
