"""Training on several processes: the losses of one process, killed and resumed on another number, and told once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for module in ("matplotlib", "PIL", "rich"):
    pytest.importorskip(module)

TESTS = Path(__file__).resolve().parents[1]
EXAMPLES = TESTS.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(TESTS / "distributed")]

import glyphs  # noqa: E402
import processes  # noqa: E402
import train_clip  # noqa: E402
from launch import Failure, run, succeeded  # noqa: E402
from thorough import LONG, THOROUGH  # noqa: E402
from torchrun_clip import in_float64, small  # noqa: E402

SETTINGS = train_clip.Settings(batch=95, steps=8, dim=32)  # two or three processes have uneven shares
LOSSES = ("clip", "sigmoid", "decomposable")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    """Two faces of some 600 letters."""
    return small(cache)


@in_float64()
def trained(settings, data, until=None, checkpoint=None, save=None):
    """A run, or the part of one: curve, towers, optimizer and memory."""
    trainer = train_clip.Trainer(settings, data)
    if checkpoint is not None:
        trainer.load(train_clip.read_checkpoint(checkpoint))
    train_clip.train(trainer, save, until=until)
    return {
        "curve": trainer.curve(),
        "model": trainer.model.state_dict(),
        "objective": trainer.objective.state_dict(),
        "moments": [state["exp_avg"] for state in trainer.optimizer.state.values()],
        "random": torch.get_rng_state(),
    }


def assert_same_run(found, wanted):
    """To the rounding of float64; checkpoints keep the curve in float64 too."""
    for name, curve in wanted["curve"].items():
        np.testing.assert_allclose(found["curve"][name], curve, rtol=1e-8)
    for name in ("model", "objective"):
        for key, value in wanted[name].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-6, atol=1e-8)
    assert torch.equal(found["random"], wanted["random"])


@pytest.fixture(scope="module")
def alone(data):
    """The same runs on one process."""
    return {loss: trained(dataclasses.replace(SETTINGS, loss=loss), data) for loss in LOSSES}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_as_one(alone, data, tmp_path, loss, count):
    found = succeeded(run(count, trained, tmp_path, dataclasses.replace(SETTINGS, loss=loss), data))
    for one in found:
        assert_same_run(one, alone[loss])
        for name in ("model", "objective"):
            assert all(torch.equal(one[name][key], value) for key, value in found[0][name].items())
        assert all(map(torch.equal, one["moments"], found[0]["moments"]))


@pytest.mark.parametrize("loss", ["clip", "decomposable"])
def test_a_run_goes_on_with_another_number_of_processes(alone, data, tmp_path, loss):
    settings, checkpoint = dataclasses.replace(SETTINGS, loss=loss), tmp_path / "checkpoint.pt"
    for count, until in ((2, 3), (1, 6), (3, None)):
        folder = tmp_path / str(count)
        folder.mkdir()
        found = succeeded(
            run(count, trained, folder, settings, data, until, checkpoint if checkpoint.exists() else None, tmp_path)
        )
    assert_same_run(found[-1], alone[loss])
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint.pt"]


def refused(settings, data):
    train_clip.Trainer(settings, data)


@pytest.mark.parametrize(("wrong", "word"), [({"loss": "dense"}, "--loss dense"), ({"batch": 1}, "batch: expected")])
def test_what_needs_one_process_says_so(data, tmp_path, wrong, word):
    for one in run(2, refused, tmp_path, dataclasses.replace(SETTINGS, **wrong), data):
        assert isinstance(one, Failure) and one.kind == "Mistake" and word in one.text


def batches(data, count):
    shares = [glyphs.BatchSampler(data, 95, seed=3, views=2, share=(k, count)) for k in range(count)]
    return [[sampler[step] for sampler in shares] for step in (0, 7)]


@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_up_the_batch_of_one_process(data, count):
    for (whole,), parts in zip(batches(data, 1), batches(data, count)):
        for name, axis in (("images", 1), ("characters", 0), ("faces", 1)):
            joined = np.concatenate([getattr(part, name) for part in parts], axis)
            assert np.array_equal(joined, getattr(whole, name)), name
        assert max(len(p.characters) for p in parts) - min(len(p.characters) for p in parts) <= 1


def normalised(sizes):
    """One step of both kinds of batch normalisation: results, gradients, and what is kept for evaluation."""
    own, found = slice(sum(sizes[: processes.number()]), sum(sizes[: processes.number() + 1])), []
    for layer, shape in ((processes.BatchNorm1d(5), (7, 5)), (processes.BatchNorm2d(5), (7, 5, 3, 2))):
        generator = torch.Generator().manual_seed(0)
        x, pull = 3 + torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        layer, x = layer.double(), x[own].requires_grad_()
        y = layer(x)
        (y.square() * pull[own]).sum().backward()
        found.append((y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    return [[v.detach() for v in part] for part in found]


def test_batch_normalisation_sees_all_rows(tmp_path):
    wanted, found = normalised([7]), succeeded(run(3, normalised, tmp_path, [4, 1, 2]))
    for i, (y, dx, dweight, dbias, mean, variance) in enumerate(wanted):
        parts = list(zip(*(one[i] for one in found)))
        for part, want in ((torch.cat(parts[0]), y), (torch.cat(parts[1]), dx), (sum(parts[2]), dweight),
                           (sum(parts[3]), dbias)):  # fmt: skip
            torch.testing.assert_close(part, want)
        for kept, want in ((parts[4], mean), (parts[5], variance)):
            assert all(torch.equal(v, kept[0]) for v in kept)
            torch.testing.assert_close(kept[0], want)


# The command, in processes that torchrun starts

long = pytest.mark.skipif(not THOROUGH, reason=LONG)


def torchrun(count, state, *options, **environment):
    """Runs the command; (status, what it printed, what it complained of)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(Path(__file__).with_name("torchrun_clip.py")), "--batch", "95", "--steps", "8", "--dim", "32"]
    command += ["--device", "cpu", "--out", str(state / "out"), "--cache", str(state / "cache"), *options]
    fixed = {"OMP_NUM_THREADS": "1", "STATE": str(state), "COLUMNS": "200"}
    environ = {**os.environ, **fixed, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
    return done.returncode, done.stdout, done.stderr


@long
def test_torchrun_is_killed_and_goes_on_with_more(alone, data, tmp_path):
    status, printed, said = torchrun(2, tmp_path, "--save-every", "2", KILL="1 5")
    assert status != 0
    assert printed.count("95 distinct characters, steps 0 to 8, cpu, 2 processes") == 1, said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.pt"], "half a file stays behind"
    assert train_clip.read_checkpoint(tmp_path / "out" / "checkpoint.pt")["step"] == 4
    assert len(list(tmp_path.glob("drawn-*"))) == len(list((tmp_path / "cache").iterdir())) == 1
    status, printed, said = torchrun(3, tmp_path, "--resume")
    assert status == 0, said
    for word in ("steps 4 to 8, cpu, 3 processes", "held-out characters, after", "metrics.json, curves.png in"):
        assert printed.count(word) == 1, printed
    assert len(list(tmp_path.glob("drawn-*"))) == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["processes"] == 3
    np.testing.assert_allclose(metrics["curve"]["loss"], alone["clip"]["curve"]["loss"], rtol=1e-8)


@long
def test_a_mistake_is_told_once(tmp_path):
    (tmp_path / "out").write_text("mine")
    status, _, said = torchrun(2, tmp_path)
    assert status != 0
    assert said.count("--out: expected a folder that can be written to") == 1


def say():
    with contextlib.redirect_stderr(io.StringIO()) as said, processes.one_speaks():
        print("usage", file=sys.stderr)
    return said.getvalue()


def test_usage_is_printed_once(tmp_path):
    assert succeeded(run(2, say, tmp_path)) == ["usage\n", ""]
