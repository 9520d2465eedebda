"""Virtual environments within the one that runs this, each with another release of a package: both go together."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path


def prepare(name: str, packages: Sequence[str], *options: str, borrows: bool = True) -> Path:
    """The Python of the environment ``name``, made if it is missing, with ``packages`` of its own.

    options: more of pip's. borrows: all else is what the environment that runs this has, which its own packages come
    before; then they bring nothing that they depend on. Without it, it has nothing else."""
    folder = Path(sys.prefix, name)
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"making {folder.name} in {folder.parent} ...", flush=True)
        venv.create(folder, clear=True, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--no-input"]
        alone = ["--no-deps"] if borrows else []
        subprocess.run([*pip, "install", "--quiet", *alone, *options, *packages], check=True)
        if borrows:  # after pip, for which the lender's packages would be there already
            own = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
            lender = sysconfig.get_path("purelib")
            Path(own, "lender.pth").write_text(f"import site; site.addsitedir({lender!r})\n")
        ready.touch()
    return python
