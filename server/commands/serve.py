"""`imprint serve`: run the server until it is told to stop."""

from __future__ import annotations

import argparse

from imprint.server.commands.common import add_settings, load_settings, with_checkpoint
from imprint.server.commands.descriptions import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Describe the command: every setting is a flag."""
    parser = add_command(
        commands,
        "serve",
        "start the server",
        "imprint serve\n"
        "imprint serve --port 9000 --data-dir /var/lib/imprint\n"
        "imprint serve --model fla-hub/delta_net-1.3B-100B --device cuda --dtype bfloat16\n"
        "imprint serve --log-format json",
        description="Start the server. Every option can also be set by its variable in brackets.",
        run=run,
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve; returns the exit code after a shutdown."""
    settings = with_checkpoint(load_settings(arguments))
    from imprint.server.serve import serve

    return serve(settings)
