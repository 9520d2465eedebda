"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

from fastattn.cli import main


def test_help_lists_every_command():
    result = CliRunner().invoke(main.app, ["--help"])
    assert result.exit_code == 0
    for name in (*main.COMMANDS, *main.GROUPS):
        assert name in result.output


def test_every_command_has_its_own_help():
    for name in (*main.COMMANDS, *main.GROUPS):
        result = CliRunner().invoke(main.app, [name, "--help"])
        assert result.exit_code == 0, name
        assert "Usage" in result.output


def test_an_unknown_command_is_refused():
    assert CliRunner().invoke(main.app, ["no-such-command"]).exit_code == 2


def test_starting_up_imports_nothing_that_is_slow():
    code = "import sys, fastattn.cli.main; print(*(m for m in ('transformers', 'onnx', 'triton') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
