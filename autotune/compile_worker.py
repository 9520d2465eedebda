"""A process that calls one function on what comes in: see :mod:`fastattn.autotune.compile_pool`.

Run as a file, with nothing but the standard library until it is told where to find the function. Messages are pickles,
each after its length in 8 bytes. In: first (path for imports, "module:function", most seconds of a job on the wall),
then jobs. Out: ("ready", None) once the function is there, then ("result", value) or ("error", text) for each job.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import IO

LENGTH = struct.Struct("<Q")
_GRACE_S = 10  # after the limit, which the parent watches: for a parent that is no more


def read(stream: IO[bytes]) -> bytes | None:
    """The next message, or None at the end."""
    head = _exactly(stream, LENGTH.size)
    return None if head is None else _exactly(stream, LENGTH.unpack(head)[0])


def _exactly(stream: IO[bytes], size: int) -> bytes | None:
    """An unbuffered stream gives what there is."""
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write(stream: IO[bytes], message: object) -> None:
    body = pickle.dumps(message)
    left = memoryview(LENGTH.pack(len(body)) + body)
    while left:
        left = left[stream.write(left) :]
    stream.flush()


def _listen(messages: queue.SimpleQueue[bytes]) -> None:
    """Hands on what comes. The end is the parent's, however it died: then this process goes too, and its compilers."""
    while (body := read(sys.stdin.buffer)) is not None:
        messages.put(body)
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no result
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    sys.path[:], name, limit_s = pickle.loads(messages.get())
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # for the thread that listens has no end
    write(out, ("ready", None))
    while True:
        job = pickle.loads(messages.get())
        # not a thread's business: what hangs may hold the interpreter's lock
        signal.alarm(int(limit_s) + _GRACE_S)
        try:
            answer = ("result", function(job))
        except Exception as error:  # whatever a compiler raises
            answer = ("error", f"{type(error).__name__}: {error}")
        signal.alarm(0)
        write(out, answer)


if __name__ == "__main__":
    main()
