"""Calls that may hang or crash, in processes that can be killed: a compiler does both, given a bad candidate.

Workers are processes of their own, kept from job to job, for Triton takes seconds to import. Each leads a process group
in which its compilers run too: what takes too long is killed as a whole, and a new worker goes on. How long is counted
in CPU time, so that what is killed does not depend on what else the machine has to do.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from fastattn.autotune import compile_worker

START_S = 300.0  # for a worker's imports, on a machine that has much else to do
PATIENCE = 20.0  # of the limit, as time on the wall: for what hangs without computing, or stands behind other work
_MOST_SAID = 500  # characters of a reason
_ERROR = ": error: "
_LEAST_S = 0.01  # between two looks at CPU times
_CPUS = os.cpu_count() or 1

K = TypeVar("K")


@dataclass(frozen=True)
class Done(Generic[K]):
    """What became of the job ``name``: its result, or the reason why there is none. seconds: what it took."""

    name: K
    seconds: float
    result: Any = None
    reason: str | None = None


@dataclass
class _Worker(Generic[K]):
    process: subprocess.Popen[bytes]
    errors: IO[bytes]  # its standard error
    deadline: float
    begun: float
    cpu_begun: float | None = None  # its CPU time at the start of the job; None where that is not told
    name: K | None = None
    is_busy: bool = True
    is_ready: bool = False

    def said(self) -> list[str]:
        """The lines of its standard error since this was asked last."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        self.errors.seek(0)  # the worker's place in the file is the same
        self.errors.truncate()
        return [line.strip() for line in lines if line.strip()]


@dataclass
class Pool(Generic[K]):
    """``workers`` processes that call ``function``, ``"module:name"``, on one job at a time each.

    limit_s: a job that takes more CPU time, or ``patience`` times as long on the wall, is killed, with all processes
    that it began; where CPU times are not told (outside Linux), the wall's decides alone. Jobs and results are pickled.
    A context manager: at its end no process of it is left, and none either when this process is killed.
    """

    function: str
    workers: int
    limit_s: float
    patience: float = PATIENCE
    environment: dict[str, str] = field(default_factory=dict)
    _all: list[_Worker[K]] = field(default_factory=list)

    def __enter__(self) -> Pool[K]:
        self._folder = tempfile.TemporaryDirectory(prefix="fastattn-compile-")  # with all that killed processes leave
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            _end(worker)
        self._all.clear()
        self._folder.cleanup()

    def results(self, jobs: Callable[[], tuple[K, Any] | None]) -> Iterator[Done[K]]:
        """Asks ``jobs`` for (name, job) whenever a worker is free, and gives what became of them, as they come.

        None says that there is no job now; it is asked again after each result, and the end is where it gives none
        while nothing runs. Raises RuntimeError where a worker can't be started, or can't import the function.
        """
        while True:
            while len([w for w in self._all if w.is_busy]) < self.workers and (job := jobs()) is not None:
                self._begin(*job)
            if not any(worker.is_busy for worker in self._all):
                return
            yield from self._wait()

    def _begin(self, name: K, job: Any) -> None:
        worker = next((worker for worker in self._all if not worker.is_busy), None) or self._start()
        worker.name, worker.is_busy = name, True
        if worker.is_ready:
            self._begun(worker)
        else:
            worker.begun = time.monotonic()
            worker.deadline = worker.begun + START_S
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which is met where answers are read
            compile_worker.write(worker.process.stdin, job)

    def _begun(self, worker: _Worker[K]) -> None:
        """The job's time runs from now."""
        worker.begun, worker.cpu_begun = time.monotonic(), cpu_seconds(worker.process.pid)
        worker.deadline = worker.begun + (self.limit_s if worker.cpu_begun is None else self.patience * self.limit_s)

    def _left(self, worker: _Worker[K]) -> float:
        """Seconds that the worker's job may go on at least; none are left where it is 0 or less."""
        left = worker.deadline - time.monotonic()
        if worker.is_ready and worker.cpu_begun is not None:
            spent = (cpu_seconds(worker.process.pid) or 0.0) - worker.cpu_begun
            left = min(left, (self.limit_s - spent) / _CPUS)  # threads of a compiler may run at the same time
        return left

    def _start(self) -> _Worker[K]:
        errors = tempfile.TemporaryFile(dir=self._folder.name)  # noqa: SIM115  closed with the worker
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(compile_worker.__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            bufsize=0,  # or what was read ahead would be hidden from the selector
            env={**os.environ, "TMPDIR": self._folder.name, **self.environment},
        )  # fmt: skip
        worker: _Worker[K] = _Worker(process, errors, 0.0, 0.0)
        self._all.append(worker)
        assert process.stdin is not None
        compile_worker.write(process.stdin, (sys.path, self.function, self.patience * self.limit_s))
        return worker

    def _wait(self) -> Iterator[Done[K]]:
        busy = [worker for worker in self._all if worker.is_busy]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            left = min(self._left(worker) for worker in busy)
            ready = [key.data for key, _ in selector.select(max(left, _LEAST_S))]
        for worker in ready:
            yield from self._answer(worker)
        for worker in busy:
            if worker not in ready and self._left(worker) <= 0:
                yield self._killed(worker)

    def _answer(self, worker: _Worker[K]) -> Iterator[Done[K]]:
        assert worker.process.stdout is not None and worker.name is not None
        body = compile_worker.read(worker.process.stdout)
        now = time.monotonic()
        if body is None:
            yield self._died(worker)
            return
        kind, value = pickle.loads(body)
        if kind == "ready":
            worker.is_ready = True
            self._begun(worker)
            return
        worker.is_busy = False
        said = worker.said()
        if kind == "result":
            yield Done(worker.name, now - worker.begun, value)
            return
        # exceptions of MLIR do not have what its compilers say
        error = next((line.split(_ERROR, 1)[1] for line in said if _ERROR in line), None)
        reason = " ".join((value if error is None else f"{value}: {error}").split())
        yield Done(worker.name, now - worker.begun, None, reason[:_MOST_SAID])

    def _died(self, worker: _Worker[K]) -> Done[K]:
        assert worker.name is not None
        code = worker.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        said = (worker.said() or ["nothing was said"])[-1]
        self._forget(worker)
        if not worker.is_ready:
            raise RuntimeError(f"a worker for {self.function} cannot start: {how}; {said}")
        return Done(
            worker.name, time.monotonic() - worker.begun, None, f"the compiler died, {how}: {said}"[:_MOST_SAID]
        )

    def _killed(self, worker: _Worker[K]) -> Done[K]:
        assert worker.name is not None
        self._forget(worker)
        if not worker.is_ready:
            raise RuntimeError(f"a worker for {self.function} did not start within {START_S:g} s")
        return Done(
            worker.name, time.monotonic() - worker.begun, None, f"it took over {self.limit_s:g} s, and was killed"
        )

    def _forget(self, worker: _Worker[K]) -> None:
        _end(worker)
        self._all.remove(worker)


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of all that it started, those that ended included; None where /proc does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return None
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # user, system, and those of children that ended
    return own + sum(cpu_seconds(int(child)) or 0.0 for child in children)


def _end(worker: _Worker[Any]) -> None:
    """Kills a worker and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # they are gone
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    for stream in (worker.process.stdin, worker.process.stdout, worker.errors):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
