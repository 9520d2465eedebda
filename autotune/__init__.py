"""Which block sizes a kernel gets on which device: measured once, kept in a cache, looked up by the ops
(:func:`fastattn.autotune.choice.lookup`)."""
