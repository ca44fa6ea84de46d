"""The microbenchmark, ``python -m bench``: every loss, ours and every peer that is installed, checked, then timed.

Where things live: ``cases`` (what is computed and how many products it needs), ``providers`` (who computes it),
``formulas`` (the plain torch formulas among them), ``check`` (is it right?), ``measure`` (interleaved times and the
GEMM floor), ``memory`` (peak memory, one process each), ``run`` (one group of cases), ``goals`` (the ratios we
promise), ``results`` (keyed rows), ``report`` and ``plot`` (tables and pictures). ``structures``, a command of its own,
measures what has no provider but us and the dense formula.
"""
