"""What is found by walking the score matrix without gradients: negatives, ranks."""

from .negatives import hardest_negatives, sample_negatives
from .retrieval import RetrievalMetrics, retrieval_metrics

__all__ = ["RetrievalMetrics", "hardest_negatives", "retrieval_metrics", "sample_negatives"]
