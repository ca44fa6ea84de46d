"""``python -m contrastive_kernels`` prints versions, backends, and why one is missing."""

from .planning.explain import report

if __name__ == "__main__":
    print(report())
