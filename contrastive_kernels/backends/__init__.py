"""The backends: two panel operations each, and the registry that chooses among them."""

from .registry import ORDER, Backend, choose, get, names, table

__all__ = ["ORDER", "Backend", "choose", "get", "names", "table"]
