"""Plain PyTorch definitions, one file an op or method: the truth that kernels are tested against, and the fallback."""
