"""Runs programs by Triton's interpreter, in a process of its own: there every ``triton.jit`` is interpreted."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from .program import Program

TIME_LIMIT_S = 120
_VARIABLE = "TRITON_INTERPRET"


class Interpreter:
    """A process that waits for programs. Close it, or use it as a context."""

    def __init__(self) -> None:
        self._process: Any = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._mine, theirs = context.Pipe()
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = "1"  # read when Triton is imported there
        try:
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        finally:
            os.environ.pop(_VARIABLE) if before is None else os.environ.update({_VARIABLE: before})

    def run(self, program: Program) -> tuple[dict[str, Any] | None, str]:
        """(the buffers afterwards as they lie in memory, "") or (None, why not)."""
        if self._process is None or not self._process.is_alive():
            self._start()
        self._mine.send(program.to_data())
        if not self._mine.poll(TIME_LIMIT_S):
            self.close()
            return None, f"took longer than {TIME_LIMIT_S} s"
        try:
            return self._mine.recv()
        except EOFError:
            self.close()
            return None, "ended its process"


def _serve(connection: Any) -> None:
    import numpy as np
    import torch
    from triton.runtime.interpreter import interpreter_builder

    from .engine import arguments, kernel_of, raw_inputs

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    # its checks of every addition for overflow say nothing unless asked for, and take half of the time
    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while True:
            try:
                program = Program.from_data(connection.recv())
            except EOFError:
                return
            raw = raw_inputs(program)
            try:
                kernel_of(program, Path(folder))[tuple(program.grid)](**arguments(program, raw))
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                connection.send((None, f"{type(error).__name__}: {error} at {last.name}:{last.lineno}"[:500]))
            else:
                connection.send((raw, ""))
