"""The published global contrastive losses, 50 steps each of random features: makes global_losses.json.

    python make_global_losses.py libauc/losses/contrastive.py fast_clip/src/fast_clip/loss.py

The files are those of libauc 2.0.1 (PyPI) and of github.com/Optimization-AI/fast_clip at efd89d5; nothing of them is
here. float64, one process, CPU. Of FastCLIP, features gathered from other processes carry no gradient, as there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

SAMPLES, BATCH, WIDTH, EPOCHS, TAU, GAMMA, DECAY = 40, 8, 4, 10, 0.1, 0.3, 6
INDIVIDUAL = {"tau_min": 0.05, "tau_max": 0.3, "rho": 0.5, "eta": 0.01, "beta": 0.9}
ADAM: dict[str, Any] = {"rate": 0.004, "betas": (0.9, 0.98)}
#: Steps whose gradients are kept.
KEPT = (0, 7, 25, 49)


def steps() -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Step, epoch, the batch's samples [B], and both towers' features [B, D]."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(SAMPLES, WIDTH, generator=g, dtype=torch.float64)
    step = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=g)
        for index in order.split(BATCH):
            x, y = (
                normalize(base[index] + torch.randn(BATCH, WIDTH, generator=g, dtype=torch.float64), dim=1)
                for _ in range(2)
            )
            yield step, epoch, index, x.requires_grad_(), y.requires_grad_()
            step += 1


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libauc(path: str, scheme: str, schedule: str) -> dict[str, Any]:
    """Logarithms of u, temperatures, and gradients of some steps."""
    options = {"gamma_schedule": schedule, "gamma_decay_epochs": DECAY, "temperature_scheme": scheme}
    loss = _module(path).GCLoss_v2(N=SAMPLES, tau=TAU, gamma=GAMMA, **options, **INDIVIDUAL)
    kept: dict[str, Any] = {}
    for step, epoch, index, x, y in steps():
        loss.adjust_gamma(epoch)
        gradients = torch.autograd.grad(loss(x, y, index)[0], (x, y))
        if step in KEPT:
            kept |= {f"dx{step}": gradients[0], f"dy{step}": gradients[1]}
    kept["log_u"] = torch.cat([loss.u1.log() + loss.b1, loss.u2.log() + loss.b2], 1)
    if scheme == "individual_learnable":
        kept["tau"] = torch.cat([loss.learnable_tau_img, loss.learnable_tau_txt], 1)
    return kept


def libauc_views(path: str, individual: bool, schedule: str) -> dict[str, Any]:
    """The same of two views of one tower."""
    options: dict[str, Any] = {"gamma_schedule": schedule, "gamma_decay_epochs": DECAY, "enable_isogclr": individual}
    loss = _module(path).GCLoss_v1(N=SAMPLES, tau=TAU, gamma=GAMMA, eps=0.0, **options, **INDIVIDUAL)
    kept: dict[str, Any] = {}
    for step, epoch, index, x, y in steps():
        loss.adjust_gamma(epoch)
        gradients = torch.autograd.grad(loss(x, y, index), (x, y))
        if step in KEPT:
            kept |= {f"dx{step}": gradients[0], f"dy{step}": gradients[1]}
    kept["log_u"] = loss.u.log()
    return kept | ({"tau": loss.learnable_tau} if individual else {})


def fast_clip_individual(path: str) -> dict[str, Any]:
    """The same of FastCLIP v2, with two changes: the loss is multiplied by the temperatures, as the one that is stated,
    and Adam's averages decay from the first epoch on, so that they are corrected for where they began.
    """
    options: dict[str, Any] = {"gamma_schedule": "cosine", "gamma_decay_epochs": DECAY, "rho": INDIVIDUAL["rho"]}
    options.update(eps=0.0, tau_init=TAU, lr_tau=ADAM["rate"], device=torch.device("cpu"))
    betas = {"beta1_tau": ADAM["betas"][0], "beta2_tau": ADAM["betas"][1]}
    loss = _module(path).FastCLIPLossIndividual(SAMPLES, gamma=GAMMA, **betas, **options)
    loss.tau_min, loss.tau_max = INDIVIDUAL["tau_min"], INDIVIDUAL["tau_max"]
    kept: dict[str, Any] = {}
    for step, epoch, index, x, y in steps():
        loss.adjust_hyperparams(epoch)
        loss.beta1_tau, loss.beta2_tau = ADAM["betas"]
        remote = (x.detach(), y.detach())
        image, text, sim_image, sim_text, found = loss.local((x, y), (index, index), remote, 0)
        names = ("u_im", "u_tt", "tau_im", "tau_tt", "bound_im", "bound_tt", "old_tau_im", "old_tau_tt",
                 "m_grad_tau_im", "m_grad_tau_tt", "v_grad_tau_im", "v_grad_tau_tt")  # fmt: skip
        loss.set_params(index, index, **dict(zip(names, found, strict=True)))
        taus, u = found[6:8], [u / tau for u, tau in zip(found[:2], found[6:8])]
        sim = (sim_text.T, sim_image.T)
        value = loss((x, y), remote, u, taus, found[4:6], (image, text), u, sim, 0)
        gradients = torch.autograd.grad(value, (x, y))
        if step in KEPT:
            kept |= {f"dx{step}": gradients[0], f"dy{step}": gradients[1]}
    kept["log_u"] = torch.cat([loss.u_im.log() + loss.bound_im, loss.u_tt.log() + loss.bound_tt], 1)
    kept["tau"] = torch.cat([loss.tau_im, loss.tau_tt], 1)
    return kept


def fast_clip(path: str, multiply_tau: bool) -> dict[str, Any]:
    """The same of FastCLIP v1, or of v3."""
    options = {"gamma_schedule": "cosine", "gamma_decay_epochs": DECAY, "rho": 6.5, "eps": 0.0}
    cpu = torch.device("cpu")
    loss = _module(path).FastCLIPLoss(SAMPLES, gamma=GAMMA, multiply_tau=multiply_tau, device=cpu, **options)
    kept: dict[str, Any] = {}
    scale = torch.tensor(1 / TAU)
    for step, epoch, index, x, y in steps():
        loss.adjust_hyperparams(epoch)
        remote = (x.detach(), y.detach())
        image, text, sim_image, sim_text, u = loss.local((x, y), (index, index), remote, scale, 0)
        loss.set_params(index, index, *u)
        value = loss((x, y), remote, u, (image, text), u, (sim_text.T, sim_image.T), scale, 0)
        gradients = torch.autograd.grad(value, (x, y))
        if step in KEPT:
            kept |= {f"dx{step}": gradients[0], f"dy{step}": gradients[1]}
    kept["log_u"] = torch.cat([loss.u_im.log(), loss.u_tt.log()], 1)
    return kept


def main() -> None:
    torch.set_default_dtype(torch.float64)
    of_libauc, of_fast_clip = sys.argv[1:]
    runs = {
        "sogclr": libauc(of_libauc, "global_constant", "constant"),
        "sogclr-cosine": libauc(of_libauc, "global_constant", "cosine"),
        "isogclr": libauc(of_libauc, "individual_learnable", "constant"),
        "isogclr-cosine": libauc(of_libauc, "individual_learnable", "cosine"),
        "sogclr-views": libauc_views(of_libauc, False, "constant"),
        "sogclr-views-cosine": libauc_views(of_libauc, False, "cosine"),
        "isogclr-views-cosine": libauc_views(of_libauc, True, "cosine"),
        "fastclip-v2": fast_clip_individual(of_fast_clip),
        "fastclip-v1": fast_clip(of_fast_clip, multiply_tau=False),
        "fastclip-v3": fast_clip(of_fast_clip, multiply_tau=True),
    }
    plain = {run: {name: value.detach().tolist() for name, value in kept.items()} for run, kept in runs.items()}
    lines = ",\n".join(f" {json.dumps(run)}: {json.dumps(kept)}" for run, kept in plain.items())
    Path(__file__).with_name("global_losses.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
