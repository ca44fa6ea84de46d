"""Every wrong argument is a TypeError or ValueError that names it, says what was expected and what came."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import contrastive_kernels as ck

X, Y, Z = torch.eye(4, 3), torch.eye(4, 3) + 0.5, torch.eye(6, 3)
LONG = torch.zeros(4, dtype=torch.int64)
ROWS = torch.zeros(4)


def case(name, expected, came, function, *arguments, error=ValueError, **options):
    """One wrong call; `name`, `expected` and `came` are looked for in the message."""
    identity = f"{function.__name__}-{name}-{came}".replace(" ", "_")
    return pytest.param(name, expected, came, error, function, arguments, options, id=identity)


CASES = [
    # features
    case("x", "tensor of shape [N, D]", "list", ck.info_nce, [[1.0]], Y, 1.0, error=TypeError),
    case("x", "[N, D]", "[4, 3, 1]", ck.info_nce, X[..., None], Y, 1.0),
    case("y", "[N, D]", "[3]", ck.info_nce, X, Y[0], 1.0),
    case("image_features", "[N, D]", "[3]", ck.clip_loss, X[0], Y, 1.0),
    case("text_features", "tensor", "NoneType", ck.sigmoid, X, None, 1.0, 0.0, error=TypeError),
    case("z2", "float16, bfloat16, float32 or float64", "torch.int64", ck.nt_xent, X, Y.long(), 1.0, error=TypeError),
    case("x and y", "same number of features", "3 and 2", ck.info_nce, X, Y[:, :2], 1.0),
    case("x", "at least one feature", "[4, 0]", ck.info_nce, X[:, :0], Y[:, :0], 1.0),
    case("x and y", "one dtype", "torch.float32 and torch.float64", ck.info_nce, X, Y.double(), 1.0, error=TypeError),
    case("image_features and text_features", "one device", "cpu and meta", ck.clip_loss, X, Y.to("meta"), 1.0),
    case("image_features and text_features", "same number of rows", "4 and 6", ck.clip_loss, X, Z, 1.0),
    case("image_features and text_features", "same number of rows", "4 and 6", ck.sigmoid, X, Z, 1.0, 0.0),
    case("z1 and z2", "same number of rows", "4 and 6", ck.nt_xent, X, Z, 1.0),
    case("x", "float16, bfloat16, float32 or float64", "float8", ck.info_nce,
         X.to(torch.float8_e4m3fn), Y.to(torch.float8_e4m3fn), 1.0, error=TypeError),
    case("x", "float16, bfloat16, float32 or float64", "float8", ck.info_nce,
         X.to(torch.float8_e4m3fn), Y.to(torch.float8_e4m3fn), 1.0, normalize=True, error=TypeError),
    case("normalize", "bool", "str", ck.nt_xent, X, Y, 1.0, normalize="no", error=TypeError),
    case("normalize", "bool", "numpy.bool", ck.nt_xent, X, Y, 1.0, normalize=X.numpy()[0, 0] > 0, error=TypeError),
    case("workspace_bytes", "int", "numpy.int64", ck.nt_xent, X, Y, 1.0, workspace_bytes=LONG.numpy()[0],
         error=TypeError),
    case("y", "dense", "torch.sparse_coo", ck.info_nce, X, Y.to_sparse(), 1.0, error=TypeError),
    # the scale and the bias
    case("logit_scale", "float or a tensor of one element", "str", ck.clip_loss, X, Y, "1.0", error=TypeError),
    case("logit_scale", "float or a tensor of one element", "NoneType", ck.info_nce, X, Y, None, error=TypeError),
    case("logit_scale", "float or a tensor of one element", "bool", ck.info_nce, X, Y, True, error=TypeError),
    case("logit_scale", "shape [4]", "[2]", ck.nt_xent, X, Y, ROWS[:2]),
    case("logit_scale", "floating-point", "torch.int64", ck.info_nce, X, Y, torch.tensor(2), error=TypeError),
    case("logit_scale", "device cpu", "meta", ck.info_nce, X, Y, torch.tensor(2.0, device="meta")),
    case("logit_bias", "one element", "[2]", ck.sigmoid, X, Y, 1.0, torch.zeros(2)),
    # positives
    case("positives", "0 <= offset <= M - N", "offset 3 with N = 4 and M = 6", ck.info_nce, X, Z, 1.0, positives=3),
    case("positives", "0 <= offset <= M - N", "offset -1", ck.info_nce, X, Z, 1.0, positives=-1),
    case("positives", "0 <= offset <= M - N", "N = 6 and M = 4", ck.info_nce, Z, X, 1.0),
    case("positives", "int64", "torch.float32", ck.info_nce, X, Z, 1.0, positives=ROWS, error=TypeError),
    case("positives", "shape [4]", "[6]", ck.info_nce, X, Z, 1.0, positives=torch.zeros(6, dtype=torch.int64)),
    case("positives", "int offset or an int64 tensor", "float", ck.info_nce, X, Z, 1.0, positives=1.0, error=TypeError),
    case("positives", "bool", "bool", ck.info_nce, X, Z, 1.0, positives=True, error=TypeError),
    case("positives", "indices in [0, 6)", "[0, 6]", ck.info_nce, X, Z, 1.0, positives=torch.tensor([0, 6, 1, 2])),
    case("positives", "indices in [0, 6)", "[-1, 0]", ck.info_nce, X, Z, 1.0, positives=torch.tensor([0, -1, 0, 0])),
    case("positives", "indices in", "[-1, 0]", ck.decomposable, X, Z, 1.0, ROWS, positives=torch.tensor([0, -1, 0, 0])),
    case("positives", "indices in", "[-2, 0]", ck.decomposable, X, Z, 1.0, ROWS,
         positives=torch.tensor([0, -2, 0, 0]), positive_logits=ROWS),
    case("positives", "device cpu", "meta", ck.info_nce, X, Z, 1.0, positives=LONG.to("meta")),
    # weights
    case("weight", "shape [4]", "[6]", ck.info_nce, X, Y, 1.0, weight=torch.ones(6)),
    case("weight", "shape [4]", "[8]", ck.nt_xent, X, Y, 1.0, weight=torch.ones(8)),
    case("weight", "tensor of shape [4]", "list", ck.clip_loss, X, Y, 1.0, weight=[1.0] * 4, error=TypeError),
    case("weight", "floating-point", "torch.int64", ck.sigmoid, X, Y, 1.0, 0.0, weight=LONG, error=TypeError),
    case("weight", "not require a gradient", "requires_grad=True", ck.info_nce, X, Y, 1.0,
         weight=torch.ones(4, requires_grad=True)),
    case("weight", "device cpu", "meta", ck.decomposable, X, Y, 1.0, ROWS, weight=ROWS.to("meta")),
    # the rest
    case("reduction", "'mean', 'sum' or 'none'", "'average'", ck.info_nce, X, Y, 1.0, reduction="average"),
    case("reduction", "'mean', 'sum' or 'none'", "None", ck.clip_loss, X, Y, 1.0, reduction=None),
    case("backend", "None or one of", "'fast'", ck.info_nce, X, Y, 1.0, backend="fast"),
    case("backend", "a name", "int", ck.nt_xent, X, Y, 1.0, backend=0, error=TypeError),
    case("backend", "None or one of", "'fast'", ck.DecomposableLoss, backend="fast"),
    case("backend", "float64 is the torch backend's", "torch.float64", ck.info_nce, X.double(), Y.double(), 1.0,
         backend="cpu"),
    case("workspace_bytes", "positive", "-5", ck.info_nce, X, Y, 1.0, workspace_bytes=-5),
    case("workspace_bytes", "int", "float", ck.info_nce, X, Y, 1.0, workspace_bytes=1e9, error=TypeError),
    case("workspace_bytes", "at least", "D = 3; got 10", ck.info_nce, X, Y, 1.0, workspace_bytes=10),
    # ids
    case("ids", "pair of them [N], [M]", "int", ck.info_nce, X, Y, 1.0, ids=3, error=TypeError),
    case("ids", "integer ids", "torch.float32", ck.clip_loss, X, Y, 1.0, ids=ROWS, error=TypeError),
    case("ids", "shape [6]", "[4]", ck.info_nce, X, Z, 1.0, ids=LONG),
    case("ids", "shape [4]", "[6]", ck.sigmoid, X, Z, 1.0, 0.0, ids=torch.arange(6)),
    case("ids", "samples' ids [N]", "tuple", ck.nt_xent, X, Y, 1.0, ids=(LONG, LONG), error=TypeError),
    case("ids", "device cpu", "meta", ck.decomposable, X, Y, 1.0, ROWS, ids=LONG.to("meta")),
    case("image_features and text_features", "same number of rows", "4 and 6", ck.sigmoid, X, Z, 1.0, 0.0),
    # what is added to the candidates' logits
    case("candidate_bias", "shape [6]", "[4]", ck.info_nce, X, Z, 1.0, candidate_bias=ROWS),
    case("candidate_bias", "floating-point", "torch.int64", ck.nt_xent, X, Y, 1.0, candidate_bias=LONG,
         error=TypeError),
    case("candidate_bias", "pair of tensors", "float", ck.clip_loss, X, Y, 1.0, candidate_bias=0.5, error=TypeError),
    case("candidate_bias", "None", "pair of log_normalizer", ck.decomposable, X, Y, 1.0, (ROWS, ROWS),
         candidate_bias=ROWS),
    # the decomposable loss
    case("log_normalizer", "shape [4]", "[6]", ck.decomposable, X, Y, 1.0, torch.zeros(6)),
    case("log_normalizer", "pair of tensors", "float", ck.decomposable, X, Y, 1.0, 0.0, error=TypeError),
    case("log_normalizer", "pair of tensors", "length 1", ck.decomposable, X, Y, 1.0, (ROWS,), error=TypeError),
    case("log_normalizer[1]", "shape [4]", "[6]", ck.decomposable, X, Y, 1.0, (ROWS, torch.zeros(6))),
    case("x and y", "same number of rows", "4 and 6", ck.decomposable, X, Z, 1.0, (ROWS, torch.zeros(6))),
    case("positives", "None", "pair", ck.decomposable, X, Y, 1.0, (ROWS, ROWS), positives=LONG),
    case("positive_logits", "shape [4]", "[6]", ck.decomposable, X, Y, 1.0, ROWS, positive_logits=torch.zeros(6)),
    case("positive_logits", "pair", "Tensor", ck.decomposable, X, Y, 1.0, (ROWS, ROWS),
         positive_logits=ROWS, error=TypeError),
    case("positive_logits", "tensor", "tuple", ck.decomposable, X, Y, 1.0, ROWS,
         positive_logits=(ROWS, ROWS), error=TypeError),
    case("shape", "above 0", "0", ck.decomposable, X, Y, 1.0, ROWS, shape=0.0),
    case("shape", "number", "str", ck.decomposable, X, Y, 1.0, ROWS, shape="1", error=TypeError),
    case("positive_constant", "at least 0", "-1", ck.decomposable, X, Y, 1.0, ROWS, positive_constant=-1.0),
    case("negative_scale", "finite", "inf", ck.decomposable, X, Y, 1.0, ROWS, negative_scale=float("inf")),
    case("negative_scale", "at least 0", "nan", ck.decomposable, X, Y, 1.0, ROWS, negative_scale=float("nan")),
]  # fmt: skip


@pytest.mark.parametrize("name, expected, came, error, function, arguments, options", CASES)
def test_message(name, expected, came, error, function, arguments, options):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{name}:"), message
    for part in (expected, came):
        assert part in message, message


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError) as caught:
        ck.info_nce(X, Y, 1.0, backend="fast")
    assert all(name in str(caught.value) for name in ck.list_backends())


def test_the_workspace_that_is_asked_for_suffices():
    """The number in the message works, in forward and in backward."""
    for backend in ck.list_backends():
        if ck.why_not(backend, X) is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            x, y = (v.to(dtype).requires_grad_() for v in (X, Y))
            with pytest.raises(ValueError, match="workspace_bytes") as caught:
                ck.clip_loss(x, y, 1.0, backend=backend, workspace_bytes=10)
            needed = int(re.search(r"at least (\d+)", str(caught.value))[1])
            ck.clip_loss(x, y, 1.0, backend=backend, workspace_bytes=needed).backward()


def test_explain_and_why_not():
    assert ck.why_not("torch", X) is None
    assert "float64" in ck.why_not("cpu", X.double()) or "not installed" in ck.why_not("cpu", X.double())
    assert "meta" in ck.why_not("cpu", X.to("meta")) or "not installed" in ck.why_not("cpu", X)
    with pytest.raises(ValueError, match="name: expected one of triton"):
        ck.why_not("fast", X)
    with pytest.raises(ValueError, match="loss: expected one of"):
        ck.explain(X, Y, loss="triplet")


def test_explain_prints_every_backend_and_the_one_that_runs(capsys):
    ck.explain(X, Z, loss="info_nce")
    lines = capsys.readouterr().out.splitlines()
    assert "info_nce of 4 x 6 scores" in lines[0]
    assert [line.split()[0] for line in lines[-len(ck.list_backends()) :]] == list(ck.list_backends())
    assert sum("chosen" in line for line in lines) == 1
    first = next(name for name in ck.list_backends() if ck.why_not(name, X) is None)
    assert next(line for line in lines if "chosen" in line).split()[0] == first


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["contrastive_kernels._C"] = None  # as if it had not been built
import torch
import contrastive_kernels as ck
x = torch.eye(4, requires_grad=True)
print(ck.why_not("cpu", x))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ck.clip_loss(x, x, 5.0).backward()
print(len(caught), caught[0].message)
try:
    ck.clip_loss(x, x, 5.0, backend="cpu")
except ValueError as error:
    print(error)
"""


def test_without_the_extension_the_torch_backend_serves_and_says_so():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=600, check=True
    )
    reason, warning, refusal = result.stdout.splitlines()
    assert "the C++ extension contrastive_kernels._C is not installed" in reason
    assert warning.startswith("1 ") and "torch backend" in warning and "not installed" in warning
    assert refusal.startswith("backend: 'cpu' cannot serve torch.float32 on cpu:") and "not installed" in refusal
