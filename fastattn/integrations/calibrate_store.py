"""Choices of calibrations on disk: ``calibrations.json`` in the cache's folder, an entry a model, method and device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from fastattn.autotune.device import describe
from fastattn.integrations import _modules
from fastattn.integrations._state import device_of
from fastattn.kernels.settings import settings

SCHEMA_VERSION = 1
LOCK_SECONDS = 60.0
# what a config says of the shape of a model, by the names that transformers has for all families
_CONFIG = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


class Key(BaseModel):
    """What a choice depends on. model: of the attention layers' config, its type and sizes, and how many layers there
    are; not its weights, so that fine-tuned models share the choice. device, arch: as cache keys have them. dtype: of
    the weights. length: of the sample, up to a power of two."""

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str
    arch: str
    device: str
    dtype: str
    model: dict[str, str | int]
    head_dim: int
    length: int = Field(gt=0)


class LayerChoice(BaseModel):
    """knobs of one layer; None: no setting is within the budget, and the layer stays dense. min_length: as a front's.
    error, time_us: of the setting."""

    model_config = ConfigDict(frozen=True, extra="allow")

    knobs: dict[str, int | bool | str | None] | None
    min_length: int | None = None
    error: float | None = None
    time_us: float | None = None


class Entry(BaseModel):
    """layers: by the index of the attention layer. max_error: the budget that they are chosen for. longest: as a
    calibration's. threads: of a CPU, when it was measured. fastattn: its version. written: when, UTC."""

    model_config = ConfigDict(frozen=True, extra="allow")

    key: Key
    layers: dict[int, LayerChoice]
    max_error: float
    longest: int
    threads: int | None = None
    fastattn: str
    written: datetime


class _File(BaseModel):
    schema_version: int
    calibrations: list[Entry]


def store_file() -> Path:
    return settings().cache_dir / "calibrations.json"


def key_of(found: Sequence[tuple[str, nn.Module]], layer: int, method: str, length: int = 1) -> Key:
    """The key of a model whose attention modules are ``found``, of which ``layer`` can be patched."""
    module = found[layer][1]
    config: Any = module.config
    sizes = {name: getattr(config, name, None) for name in _CONFIG}
    device = describe(device_of(module))
    parameter = next(module.parameters(), None)
    head_dim = _modules.head_dim(module)
    assert head_dim is not None
    return Key(
        method=method,
        arch=device.arch,
        device=device.name,
        dtype="" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        model={
            "type": str(getattr(config, "model_type", "")),
            **{name: size for name, size in sizes.items() if isinstance(size, int)},
            "attention_layers": len(found),
        },
        head_dim=head_dim,
        length=1 << (length - 1).bit_length(),
    )


def read() -> list[Entry]:
    """All entries; a file that cannot be read counts as empty, with a warning that says why."""
    file = store_file()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        _warn(file, str(error))
        return []
    try:
        content = _File.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        _warn(file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": "))
        return []
    if content.schema_version != SCHEMA_VERSION:
        _warn(file, f"it has schema version {content.schema_version}, and this fastattn knows {SCHEMA_VERSION}")
        return []
    return content.calibrations


def write(key: Key, layers: dict[int, LayerChoice], **facts: Any) -> Path:
    """Stores the choice for ``key`` in place of an earlier one. facts: max_error, longest and threads of an entry.

    A file that can't be read is kept beside the new one, with ``.unreadable`` after its name. Raises
    :class:`filelock.Timeout`, a TimeoutError, where another process holds the lock for over a minute, OSError where the
    folder can't be written.
    """
    from fastattn import __version__

    fresh = Entry(key=key, layers=layers, fastattn=__version__, written=datetime.now(UTC), **facts)
    file = store_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=LOCK_SECONDS):
        known = read()
        if not known and file.exists():
            os.replace(file, file.with_name(f"{file.name}.unreadable"))
        kept = [entry for entry in known if entry.key != key]
        content = _File(schema_version=SCHEMA_VERSION, calibrations=[*kept, fresh])
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content.model_dump_json(indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    return file


def find(key: Key) -> Entry | None:
    """The entry for ``key``, of whatever length: the longest, for what serves long inputs serves short ones."""
    same = [entry for entry in read() if entry.key.model_copy(update={"length": key.length}) == key]
    return max(same, key=lambda entry: entry.key.length, default=None)


def _warn(file: Path, reason: str) -> None:
    warnings.warn(f"the calibrations in {file} are ignored: {reason}", RuntimeWarning, stacklevel=4)
