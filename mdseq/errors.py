"""Exceptions that speak to the user, and how a command line ends."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong, where, what is allowed and how to fix it.

    Commands print the message alone, without a traceback, and exit with status 2.
    """


class Separated(Exception):
    """Nodes or ranks of a run have not found each other, or have lost each other; another start may mend it."""


def exit_status(command: Callable[[], object], when_interrupted: str) -> int:
    """Run a command: 0 when it is done, 2 after a mistake of the user, 130 after Ctrl-C; one message for each."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
    return 0
