"""Runs every kernel of ours under ttsem, which executes Triton's IR and watches its memory: ``make ttsem``.

ttsem asks for a newer Python than ours and pins a Triton and a torch of its own, and needs neither: it goes into a
virtual environment that borrows all else from the one that this script runs in, and lies within it. Arguments are
pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import environments

ROOT = Path(__file__).parents[2]
VERSION = "0.1.0"


def prepare() -> Path:
    """The Python of ttsem's environment, made if it is missing."""
    return environments.prepare(f"ttsem-{VERSION}", [f"ttsem=={VERSION}"], "--ignore-requires-python")


def main() -> int:
    os.chdir(ROOT)
    # -rs: what ttsem can't run is a test that is skipped, and its reason is printed
    options = ["-q", "-rs", "-p", "no:cacheprovider", "--durations=5"]
    command = [str(prepare()), "-m", "pytest", *options, "tests/ttsem/kernels.py", *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
