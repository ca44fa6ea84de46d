"""Steps of training whose batch does not fit."""

from .cached import cached_loss, cached_step

__all__ = ["cached_loss", "cached_step"]
