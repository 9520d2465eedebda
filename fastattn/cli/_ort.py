"""``fastattn build --ort``: the library of custom ops, as a file to be taken elsewhere or in the user's cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape


def build_ort(
    model: Path | None, head_dims: Sequence[int], dtypes: Sequence[str], levels: Sequence[str] | None,
    cuda: Sequence[str], output: Path | None, say: Callable[[str], object],
) -> int:  # fmt: skip
    """Builds and says where it is. Returns the exit status. Raises ValueError for options that make no sense, and
    OSError where ``output`` can't be written."""
    from fastattn.export import custom_ops_library
    from fastattn.kernels.errors import Unsupported

    start = time.perf_counter()
    try:
        path = custom_ops_library(
            model,
            head_dims=head_dims,
            dtypes=dtypes,
            levels=levels,
            cuda=cuda,
            output=output,
            on_built=lambda name: say(f"built  {name}"),
        )
    except Unsupported as error:
        say(f"[red]not built:[/red] {escape(str(error))}")
        return 1
    say(f"{path}  ({time.perf_counter() - start:.1f} s)")
    return 0
