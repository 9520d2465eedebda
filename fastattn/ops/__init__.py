"""torch.library ops, one file each: validation, fake kernels, autograd, and the choice between kernel and reference."""
