"""`imprint serve`: run the server until it is told to stop."""

from __future__ import annotations

import argparse

from imprint.server.commands.common import add_settings, load_settings, with_checkpoint


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command: every setting is a flag."""
    parser = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Every option can also be set by its variable in brackets.",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve; returns the exit code after a shutdown."""
    settings = with_checkpoint(load_settings(arguments))
    from imprint.server.serve import serve

    return serve(settings)
