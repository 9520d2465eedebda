"""What a timing depends on. Rows are found again by these fields alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from fastattn.autotune.device import DeviceName, machine_compiler, triton_version
from fastattn.autotune.shape import bucket
from fastattn.autotune.source import source_hash
from fastattn.kernels.config import FP_FUSION

Flag = bool | int | str
Count = Annotated[int, Field(ge=1, lt=2**63)]


class Key(BaseModel):
    """kernel: its name. source: the hash of its source with helpers (:func:`~fastattn.autotune.source.source_hash`).
    arch, device, threads: see :class:`~fastattn.autotune.device.DeviceName`.
    dtype: torch's name, ``"float32"``. shape: a bucket (:func:`~fastattn.autotune.shape.bucket`).
    flags: what else selects code (``is_causal``, ...); those that are False or 0 are left out.
    triton, compiler: versions. fp_fusion: whether a * b + c may be contracted."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kernel: str
    source: str
    arch: str
    device: str
    threads: int | None = None
    dtype: str
    shape: dict[str, Count]
    flags: dict[str, Flag] = {}
    triton: str
    compiler: str
    fp_fusion: bool

    def identity(self) -> str:
        """Equal for equal keys, also where a later fastattn added fields; sorts keys in files."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def differences(self, other: Key) -> list[str]:
        """Names of the fields, but for the shape, in which two keys differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [name for name in sorted({*mine, *theirs} - {"shape"}) if mine.get(name) != theirs.get(name)]


def key_for(
    kernel: str, device: DeviceName, dtype: torch.dtype, shape: Mapping[str, int], flags: Mapping[str, Flag]
) -> Key:
    """The key under which a call's timings stand. Raises ValueError for an unknown kernel or a size below 1."""
    return Key(
        kernel=kernel,
        source=source_hash(kernel),
        arch=device.arch,
        device=device.name,
        threads=device.threads,
        dtype=str(dtype).removeprefix("torch."),
        shape=bucket(shape),
        flags={name: value for name, value in sorted(flags.items()) if value},
        triton=triton_version(),
        compiler=machine_compiler(device.arch),
        fp_fusion=FP_FUSION,
    )


def outdated(key: Key) -> list[str]:
    """Names of the fields that say ``key`` belongs to other code than this installation's: its rows serve nobody here.

    Raises ValueError for a kernel that this fastattn does not have, ImportError where Triton is missing.
    """
    present = {
        "source": source_hash(key.kernel), "triton": triton_version(), "compiler": machine_compiler(key.arch),
        "fp_fusion": FP_FUSION,
    }  # fmt: skip
    return [name for name, value in present.items() if value != getattr(key, name)]
