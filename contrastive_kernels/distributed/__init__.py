"""The losses over the ranks of a process group: exact, with the least communication."""

from .transport import count_traffic

__all__ = ["count_traffic"]
