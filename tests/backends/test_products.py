"""Matrix products of bfloat16 operands on the CPU: exact, and without a trace in the process's settings."""

from __future__ import annotations

import pytest
import torch

from contrastive_kernels.backends.products import _AmxProducts, default_weights_dtype, score_product
from contrastive_kernels.panels.panel import Panel

EPS = torch.finfo(torch.float32).eps


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no setting of the products")
def test_the_precision_of_other_products_is_left_as_it_was():
    """A setting that is inherited stays inherited: the loss within `flags` must not outlast them."""
    mkldnn = torch.backends.mkldnn
    switch = _AmxProducts()

    def run():
        with switch, switch:
            assert mkldnn.matmul.fp32_precision == "bf16"

    assert mkldnn.matmul.fp32_precision == "none"
    run()
    assert mkldnn.matmul.fp32_precision == "none"
    before = mkldnn.fp32_precision
    try:
        mkldnn.fp32_precision = "bf16"
        run()
        assert mkldnn.matmul.fp32_precision == "bf16"
        mkldnn.fp32_precision = "ieee"
        assert mkldnn.matmul.fp32_precision == "ieee", "no longer inherited"
        mkldnn.matmul.fp32_precision = "bf16"
        run()
        assert mkldnn.matmul.fp32_precision == "bf16"
    finally:
        mkldnn.fp32_precision, mkldnn.matmul.fp32_precision = before, "none"


def test_bfloat16_products_are_exact(set_threads):
    """Products of bfloat16 values, summed in float32: nothing is rounded to bfloat16, whichever unit multiplies."""
    set_threads(2)
    for rows, cols, d in ((300, 500, 64), (65, 70, 1000), (1, 257, 7)):
        g = torch.Generator().manual_seed(d)
        x, y = (torch.randn(n, d, generator=g).bfloat16().float() for n in (rows, cols))
        scores = torch.empty(rows, cols)
        score_product(Panel(x, y, scores, scores, torch.tensor([1.0, 0.0, 0.0]), bfloat16_values=True))
        exact = x.double() @ y.double().T
        size = x.double().abs() @ y.double().abs().T
        assert ((scores.double() - exact).abs() <= 4 * EPS * size).all()


def test_without_onednn_bfloat16_weights_stay_in_float32(monkeypatch):
    """Builds without it (some for ARM) have none of its operators to ask."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert default_weights_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
