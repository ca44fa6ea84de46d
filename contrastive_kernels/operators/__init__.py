"""The primitives as torch.library operators and autograd Functions."""
