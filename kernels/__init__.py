"""The Triton kernels, and the one door through which they reach a device (:mod:`fastattn.kernels.launch`)."""
