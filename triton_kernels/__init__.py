"""The Triton kernels, imported as ``contrastive_kernels._triton``, and only on need: Triton may be missing."""
