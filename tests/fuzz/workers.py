"""Batches of work in processes of which any may die, of a crash or for want of memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Batch], Result],
    batches: Sequence[Batch],
    jobs: int,
    initializer: Callable[[], object] | None = None,
    method: str = "spawn",
) -> Iterator[tuple[Batch, Result | None]]:
    """Each batch with what came of it, as they are done; None for one whose process died of it.

    A pool doesn't tell whose process died: the batches that it had at work are each done again alone.
    """
    context = multiprocessing.get_context(method)
    left = list(reversed(batches))
    while left:
        at_work: dict[Future[Result], Batch] = {}
        with ProcessPoolExecutor(jobs, context, initializer) as pool:
            try:
                while left or at_work:
                    while left and len(at_work) < jobs:
                        future = pool.submit(work, left[-1])
                        at_work[future] = left.pop()
                    for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield at_work.pop(future), result
            except BrokenProcessPool:
                pass
        for batch in at_work.values():
            with ProcessPoolExecutor(1, context, initializer) as pool:
                try:
                    result = pool.submit(work, batch).result()
                except BrokenProcessPool:
                    result = None
            yield batch, result
