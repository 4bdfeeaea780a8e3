"""The command `mdseq`: what one does besides preparing data and training. Each module is a command.

Exit status: 0 done, 2 a mistake of the user (one message, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mdseq.cli import evaluate, export, generate, inspect, plan, report, status
from mdseq.cli.arguments import Command
from mdseq.errors import exit_status

COMMANDS = (generate, evaluate, export, report, status, inspect, plan)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_status(lambda: options.command(options), "interrupted")


def parser() -> argparse.ArgumentParser:
    """Knows all commands, and loads nothing heavy: a command imports what it needs when it runs."""
    parser = argparse.ArgumentParser(prog="mdseq", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Command)
    for command in COMMANDS:
        command.add_command(commands)
    return parser
