"""The tuner's choice for kernels that are compiled ahead, for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastattn.autotune.choice import explain
from fastattn.autotune.device import DeviceName
from fastattn.autotune.key import Flag
from fastattn.autotune.rooms import room_of
from fastattn.kernels.config import Config


def tuned(kernel: str, device_type: str, dtype: torch.dtype, flags: Mapping[str, Flag], **sizes: int) -> Config | None:
    """What the cache has for a kernel of a GPU's architecture, ``"cuda:90"``; None where it has nothing, and for any
    other device, for which heuristics serve.

    flags: as the kernel's op looks it up. sizes: fields of the room's ``Sizes``; of the others, the defaults, for a
    library does not know how long inputs will be. A row of any GPU of the architecture will do.
    """
    if not device_type.startswith("cuda:"):
        return None
    architecture = device_type.replace("cuda:", "sm_")
    shape = room_of(kernel).Sizes(**sizes).shape(kernel)
    return explain(kernel, DeviceName(architecture, architecture), dtype, shape, flags).config
