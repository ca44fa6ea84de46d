"""The modules: open_clip's calls, pickles, copies, moves, wrappers, and process groups."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import contrastive_kernels as ck

MODULES = {
    ck.InfoNCELoss: ck.info_nce,
    ck.ClipLoss: ck.clip_loss,
    ck.NTXentLoss: ck.nt_xent,
    ck.SigmoidLoss: ck.sigmoid,
    ck.DecomposableLoss: ck.decomposable,
}


def arguments(module, n=6):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=g) for _ in range(2))
    extra = {ck.SigmoidLoss: (-1.0,), ck.DecomposableLoss: (torch.ones(n),)}.get(module, ())
    return (x, y, 1.5, *extra)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_its_function(module):
    """Defaults, and every option that the constructor takes."""
    given = arguments(module)
    assert torch.equal(module()(*given), MODULES[module](*given))
    options = {"reduction": "none", "normalize": True, "backend": "torch", "workspace_bytes": 2**20}
    if module is ck.DecomposableLoss:
        options.update(shape=1.0, positive_constant=0.5, negative_scale=2.0)
    torch.manual_seed(0)
    want = MODULES[module](*given, **options)
    torch.manual_seed(0)
    assert torch.equal(module(**options)(*given), want)
    if module is not ck.DecomposableLoss:
        weight = torch.linspace(0, 1, 6)
        assert torch.equal(module()(*given, weight=weight), MODULES[module](*given, weight=weight))


def test_arguments_of_a_call_pass_through():
    x, y, scale = arguments(ck.InfoNCELoss)
    positives = torch.tensor([3, 1, 1, 0, 5, 2])
    assert torch.equal(
        ck.InfoNCELoss()(x, y, scale, positives=positives), ck.info_nce(x, y, scale, positives=positives)
    )
    log_z, logits = (torch.ones(6), torch.zeros(6)), (torch.ones(6), -torch.ones(6))
    module = ck.DecomposableLoss(shape=0.5, return_log_normalizer=True)
    loss, (rows, cols) = module(
        x, y, scale, log_z, positive_logits=logits, weight=torch.arange(6.0), generator=torch.Generator().manual_seed(1)
    )
    want, (want_rows, want_cols) = ck.decomposable(
        x, y, scale, log_z, positive_logits=logits, weight=torch.arange(6.0), shape=0.5, return_log_normalizer=True,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert torch.equal(loss, want) and torch.equal(rows, want_rows) and torch.equal(cols, want_cols)


@pytest.mark.parametrize("module", MODULES)
def test_modules_copy_pickle_and_move(module):
    given = arguments(module)
    loss = module(reduction="sum", normalize=True)
    want = loss(*given)
    stored = io.BytesIO()
    torch.save(loss, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(stored, weights_only=False),
        loss.to(torch.bfloat16).to("cpu").eval().train(),
    ):
        assert torch.equal(other(*given), want)
    assert not list(loss.parameters()) and loss.state_dict() == {}
    loss.load_state_dict({})
    assert "reduction='sum'" in repr(loss) and "normalize=True" in repr(loss)


@pytest.mark.parametrize("module", MODULES)
def test_modules_refuse_wrong_options_at_once(module):
    with pytest.raises(ValueError, match="reduction"):
        module(reduction="average")
    with pytest.raises(ValueError, match="workspace_bytes"):
        module(workspace_bytes=0)
    with pytest.raises(TypeError, match="unknown"):
        module(unknown=1)


@pytest.mark.parametrize("module", [ck.ClipLoss, ck.SigmoidLoss])
def test_open_clip_calls(module):
    """As open_clip's train_one_epoch calls its losses: model_out by keywords, output_dict=True."""
    x, y, *_ = arguments(module)
    scale = torch.tensor(1.5, requires_grad=True)
    model_out = {"image_features": x, "text_features": y, "logit_scale": scale}
    bias = torch.tensor(-1.0, requires_grad=True)
    biased = {**model_out, "logit_bias": bias}
    for out in (model_out, biased):
        losses = module()(**out, output_dict=True)
        assert list(losses) == ["contrastive_loss"]
        alone = module()(**out)
        assert torch.is_tensor(alone) and torch.equal(losses["contrastive_loss"], alone)
        sum(losses.values()).backward()
    want = ck.clip_loss(x, y, 1.5) if module is ck.ClipLoss else ck.sigmoid(x, y, 1.5, -1.0)
    assert torch.equal(alone.detach(), want)
    assert bias.grad is not None, "data parallelism wants a gradient for every parameter"
    assert (bias.grad == 0) == (module is ck.ClipLoss)
    assert torch.equal(module()(x, y, 1.5, -1.0), want), "positional arguments, floats"
    assert torch.equal(module()(x, y, 1.5, None), module()(x, y, 1.5)), "a model without a bias passes None"
    names = list(inspect.signature(module.forward).parameters)
    assert names[1:6] == ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]


class Model(nn.Module):
    """Two towers, a learnable temperature and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(10, 8), nn.Linear(10, 8)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, a, b):
        return {
            "image_features": nn.functional.normalize(self.image(a), dim=1),
            "text_features": nn.functional.normalize(self.text(b), dim=1),
            "logit_scale": self.log_scale.exp(),
            "logit_bias": self.bias,
        }


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def process_group():
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", [ck.ClipLoss(), ck.SigmoidLoss()], ids=["clip", "sigmoid"])
def test_a_distributed_data_parallel_model_trains(loss, process_group):
    """Several steps, as without the wrapper: every parameter has its gradient, the bias too."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 10, generator=g) for _ in range(2))
    curves = []
    for wrap in (nn.parallel.DistributedDataParallel, lambda model: model):
        model = wrap(Model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            value = loss(**model(a, b), output_dict=True)["contrastive_loss"]
            value.backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < 0.7 * curves[0][0]


def test_the_group_of_one_is_no_obstacle(process_group):
    assert ck.ClipLoss()(torch.eye(3), torch.eye(3), 2.0).isfinite()
