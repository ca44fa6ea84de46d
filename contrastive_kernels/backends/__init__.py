"""The backends: operations on a panel, a class each, and the registry that chooses among them."""

from .base import Backend, Entries
from .registry import ORDER, choose, get, names, table

__all__ = ["ORDER", "Backend", "Entries", "choose", "get", "names", "table"]
