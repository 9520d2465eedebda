"""Triton's own launcher, which calls libcuda.so.1: for what kernels are given when PyTorch runs them.

Run as a program, it takes launches on its standard input and makes them: see :func:`main`. A libcuda.so.1 must be in
the folder $TRITON_LIBCUDA_PATH.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
from triton.runtime import driver


def launch(cuda: CudaDriver, given: dict[str, Any], functions: dict[tuple[str, str], int]) -> None:
    """Makes a launch: its cubin's file, entry, types and values by argument in the kernel's order, grid, num_warps,
    num_ctas, shared and stream."""
    name = given["cubin"], given["entry"]
    if name not in functions:
        with open(given["cubin"], "rb") as file:
            image = file.read()
        _, functions[name], *_ = cuda.utils.load_binary(given["entry"], image, given["shared"], 0)
    names = list(given["types"])
    constants = {(names.index(x),): value for x, value in given["values"].items() if given["types"][x] == "constexpr"}
    source = SimpleNamespace(constants=constants, signature=given["types"])
    metadata = SimpleNamespace(
        num_ctas=given["num_ctas"], global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, instrumentation_mode="",
    )  # fmt: skip
    grid = (*given["grid"], 1, 1)[:3]
    packed = given["num_warps"], given["num_ctas"], given["shared"]
    values = [given["values"][x] for x in names]
    CudaLauncher(source, metadata)(*grid, given["stream"], functions[name], packed, None, None, None, *values)


def main() -> None:
    """In: a list of launches."""
    sys.setdlopenflags(os.RTLD_LAZY)  # the driver below has no more functions than are called
    cuda = CudaDriver()
    driver.set_active(cuda)
    functions: dict[tuple[str, str], int] = {}
    for given in json.load(sys.stdin):
        launch(cuda, given, functions)


if __name__ == "__main__":
    main()
