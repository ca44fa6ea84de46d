"""The backends: operations on a panel, a class each, and the registry that chooses among them."""

from .base import Backend
from .registry import ORDER, choose, get, names, table

__all__ = ["ORDER", "Backend", "choose", "get", "names", "table"]
