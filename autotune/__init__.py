"""Which block sizes a kernel gets on which device: measured once, kept in a cache, looked up by the ops."""

from fastattn.autotune.choice import lookup

__all__ = ["lookup"]
