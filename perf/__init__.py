"""Benchmarks: every speed is a ratio of medians from one interleaved run."""
