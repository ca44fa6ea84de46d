"""How far a call walks through the house: files entered, Python calls, and downwards only; where a vector is known."""

import sys

import pytest
import torch
from house import ROOMS, ROOT, room_of

import contrastive_kernels as ck

HERE = "/contrastive_kernels/"


def walk(work):
    """(file, function) of every Python call of ours within `work`, and of the caller of ours above it."""
    calls = []

    def ours(frame):
        while frame is not None and HERE not in frame.f_code.co_filename:
            frame = frame.f_back
        return frame and frame.f_code.co_filename.rpartition(HERE)[2]

    def profile(frame, event, _):
        if event == "call" and HERE in frame.f_code.co_filename:
            file = frame.f_code.co_filename.rpartition(HERE)[2]
            calls.append((file, frame.f_code.co_name, ours(frame.f_back)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize(
    "options, files, most", [({}, 12, 80), ({"workspace_bytes": 64 * 1024}, 14, 160)], ids=["one call", "panels"]
)
def test_clip_loss_walks_downwards_through_few_files(options, files, most):
    """N = 128: in one call of the C++ pass, and in panels of a workspace that holds no more."""
    if ck.why_not("cpu", torch.zeros(1, 1)) is not None:
        pytest.skip("the extension is not built")
    image, text = (torch.randn(128, 64).requires_grad_() for _ in range(2))
    scale, loss = torch.tensor(5.0, requires_grad=True), ck.ClipLoss(**options)
    loss(image, text, scale)  # what is cached is cached
    calls = walk(lambda: loss(image, text, scale))
    entered = list(dict.fromkeys(file for file, _, _ in calls))
    print(f"{len(entered)} files, {len(calls)} calls: {', '.join(entered)}")
    assert len(entered) <= files and len(calls) <= most
    for file, name, above in calls:
        if above is not None:
            rooms = [ROOMS.index(room_of(each.replace("/", "."))) for each in (above, file)]
            assert rooms[0] <= rooms[1], f"{above} calls {name} of {file}, which is above it"


def test_a_vector_that_goes_into_a_logit_is_known_in_few_files():
    """The bias of columns on all backends; all other files hand on what says it."""
    sources = {
        path.resolve()
        for folder in ("contrastive_kernels", "csrc", "triton_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu"}
    }
    knowing = sorted(str(path.relative_to(ROOT)) for path in sources if "col_bias" in path.read_text())
    assert 0 < len(knowing) <= 8, f"{len(knowing)} files: {', '.join(knowing)}"
