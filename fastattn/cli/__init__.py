"""The ``fastattn`` command, one file a subcommand."""
