"""The backends: operations on a panel, a class each, and the registry that chooses among them."""

from .base import Apart, Backend
from .registry import ORDER, choose, get, names, table

__all__ = ["ORDER", "Apart", "Backend", "choose", "get", "names", "table"]
