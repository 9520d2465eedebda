"""What workers of a pool call in tests, in place of a compiler: nothing here imports more than it must."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def behave(job: tuple[str, Any]) -> object:
    """("return", x), ("raise", text), ("print", text), ("pid", None), ("die", None), ("exit", status), ("spin", None):
    holds the interpreter's lock for ever, ("burn", None): computes for ever, ("sleep", seconds), or ("child", file):
    waits for a process whose number it writes there."""
    what, value = job
    if what == "raise":
        os.write(2, b"kernel.py:7:0: error: 'ttng.tc_gen5_mma' op LHS CTASplit along K should be 1\n}\n")
        os.write(2, b"<unknown>:0: error: Failures have been detected\n")
        raise ValueError(value)
    if what == "print":
        print(value, flush=True)
        os.write(1, value.encode())
    if what == "pid":
        return os.getpid()
    if what == "die":
        os.write(2, b"Assertion `block == 0' failed.\n")
        ctypes.string_at(0)
    if what == "exit":
        os._exit(value)
    if what == "spin":
        ctypes.PyDLL(None).pause()
    if what == "burn":
        while True:
            pass
    if what == "sleep":
        time.sleep(value)
    if what == "child":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        Path(value).write_text(str(child.pid))
        child.wait()
    return value
