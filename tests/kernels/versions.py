"""Runs the engine's tests with every release of Triton that it knows: ``make tritons``.

Each release has a virtual environment of its own, which borrows all but Triton from the one that this script runs in.
Arguments are pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fastattn.kernels.cpu.frontend import TESTED
from tests import environments

ROOT = Path(__file__).parents[2]
# What a release needs beside itself: the interpreter of 3.6 makes numbers of arrays in a way that NumPy 2.4 refuses.
ALSO = {"3.6": ["numpy<2.4"]}

# What binaries for GPUs cost is recorded for one release of Triton.
NOT_THE_ENGINE = ["--ignore=tests/kernels/test_budgets.py"]


def prepare(release: str) -> Path:
    """The Python of the environment for a release, made if it is missing."""
    return environments.prepare(f"triton-{release}", [f"triton=={release}.*", *ALSO.get(release, [])])


def run(release: str, arguments: list[str]) -> bool:
    """Tests one release and prints a line on it; whether everything passed."""
    python = prepare(release)
    found = subprocess.run([python, "-c", "import triton; print(triton.__version__, triton.__file__)"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    if not found[1].startswith(str(python.parents[1])):
        raise SystemExit(f"the environment for Triton {release} imports {found[1]}")
    log = python.parents[1] / "tests.log"
    with log.open("w") as file:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", *NOT_THE_ENGINE, *arguments]
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    last = (log.read_text().splitlines() or ["no output"])[-1]
    print(f"triton {found[0]}: {last}" + (f"; see {log.relative_to(ROOT)}" if code else ""), flush=True)
    return code == 0


def main() -> None:
    os.chdir(ROOT)
    results = [run(release, sys.argv[1:]) for release in TESTED]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
