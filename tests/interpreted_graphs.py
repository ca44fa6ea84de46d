"""What tests/interpreted.py asks of autograd: graphs that are kept, saved tensors elsewhere, dtypes of scalars."""

from __future__ import annotations

import torch

import contrastive_kernels as ck


def again() -> list[str]:
    """What fails where gradients are asked for twice, in part, or with a graph of their own."""
    failures = []
    for loss in ("clip_loss", "info_nce", "nt_xent", "sigmoid", "decomposable"):
        x, y = (torch.nn.functional.normalize(torch.randn(9, 16)).requires_grad_() for _ in range(2))
        scale = torch.tensor(5.0, requires_grad=True)
        leaves = [x, y, scale]
        found = {}
        for backend in ("triton", "torch"):
            tables = torch.linspace(-1, 2, 9), torch.linspace(2, -1, 9)
            further = {"sigmoid": (-2.0,), "decomposable": (tables,)}.get(loss, ())
            value = getattr(ck, loss)(*leaves, *further, backend=backend)
            for table in tables:  # which may move before the backward pass
                table.zero_()
            first = torch.autograd.grad(value, leaves, torch.tensor(3.0), retain_graph=True)
            part = torch.autograd.grad(value, [y], torch.tensor(3.0), retain_graph=True)
            made = torch.autograd.grad(value, leaves, torch.tensor(3.0), create_graph=True)
            second = torch.autograd.grad(sum((g**2).sum() for g in made), leaves)
            found[backend] = [*first, *made, *second]
            if not torch.equal(part[0], first[1]):
                failures.append(f"{loss}: a gradient differs where it is asked for alone")
        for ours, theirs in zip(found["triton"], found["torch"]):
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item()):
                failures.append(f"{loss}: a derivative differs by {(ours - theirs).abs().max()}")
    return failures + elsewhere()


def elsewhere() -> list[str]:
    """What fails where hooks keep saved tensors in another layout, or at an address that is not aligned."""

    def turned(saved: torch.Tensor) -> torch.Tensor:
        return saved.t().contiguous().t() if saved.dim() == 2 else saved

    def shifted(saved: torch.Tensor) -> torch.Tensor:
        place = saved.new_empty(saved.numel() + 1)[1:].view(saved.shape)
        return place.copy_(saved)

    failures = []
    for loss in ("clip_loss", "nt_xent", "sigmoid"):
        x, y = (torch.nn.functional.normalize(torch.randn(9, 16)).requires_grad_() for _ in range(2))
        found = []
        for kept in (lambda saved: saved, turned, shifted):
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, kept):
                value = getattr(ck, loss)(x, y, 5.0, *([-2.0] if loss == "sigmoid" else []), backend="triton")
            found.append(torch.cat(torch.autograd.grad(value, [x, y])))
        for name, other in zip(("turned", "shifted"), found[1:]):
            if not torch.equal(found[0], other):
                failures.append(f"{loss}: gradients differ where saved tensors come back {name}")
    return failures + other_dtypes()


def other_dtypes() -> list[str]:
    """What fails where scale and bias have a dtype of their own."""
    failures = []
    x, y = (torch.nn.functional.normalize(torch.randn(9, 16)).requires_grad_() for _ in range(2))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        leaves = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (5.0, -2.0)]
        found = [torch.autograd.grad(ck.sigmoid(x, y, *leaves, backend=b), leaves) for b in ("triton", "torch")]
        for ours, theirs in zip(*found):
            if ours.dtype != dtype or not torch.allclose(ours, theirs, rtol=max(1e-5, torch.finfo(dtype).eps)):
                failures.append(f"sigmoid: {ours} is not {theirs} for scale or bias of {dtype}")
    return failures
