"""The ``fastattn`` command: gathers the subcommands, each of which lives in a file of its own.

A subcommand's file defines ``command``, a function whose docstring is its help, or ``app``, a group of commands. It
imports at its top only what is quick to import, for every start of ``fastattn`` reads all of them.
"""

from __future__ import annotations

from importlib import import_module

import typer

COMMANDS = ("demo", "doctor", "build", "devices", "tune", "calibrate", "export", "inspect")
GROUPS = ("cache",)

app = typer.Typer(
    name="fastattn",
    help="Attention that is cheap on long sequences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for _name in COMMANDS:
    app.command(_name)(import_module(f"fastattn.cli.{_name}").command)
for _name in GROUPS:
    app.add_typer(import_module(f"fastattn.cli.{_name}").app, name=_name)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
