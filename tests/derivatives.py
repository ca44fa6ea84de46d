"""torch's own checks of derivatives against differences."""

from __future__ import annotations

from functools import partial

import torch
from thorough import THOROUGH

__all__ = ["gradcheck", "gradgradcheck"]

#: Every entry of the Jacobian.
gradcheck = torch.autograd.gradcheck
#: One drawn projection of the second derivatives, which takes n evaluations for n^2; every entry in the long form.
gradgradcheck = partial(torch.autograd.gradgradcheck, fast_mode=not THOROUGH)
