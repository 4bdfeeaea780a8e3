"""Types of arguments that several commands take: they turn what was typed into a value, or say what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

# What a denoiser's output may be taken for (mdseq/diffusion/estimates.py, which would load torch).
ESTIMATES = ("output", "softmax", "posterior")
PROCESSES = ("noise", "absorbing")


class Command(argparse.ArgumentParser):
    """Of a command.

    Attributes:
        intermixed: Whether options may stand between the arguments. argparse can do it where there are no commands
            within the command.
    """

    intermixed = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # it calls this in turn
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True


def at_least(least: int) -> Callable[[str], int]:
    """An integer of `least` or more."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give {least} or more") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not allowed; give {least} or more")
        return value

    return integer


def number_between(least: float, most: float = math.inf, *, least_allowed: bool = True) -> Callable[[str], float]:
    """A finite number in [least, most], or in (least, most]."""
    above = f"{least:g} or more" if least_allowed else f"more than {least:g}"
    allowed = f"{above}, up to {most:g}" if math.isfinite(most) else above

    def number(text: str) -> float:
        value = float(text)
        inside = math.isfinite(value) and least <= value <= most and (least_allowed or value > least)
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number of {allowed}")
        return value

    return number


def seed(text: str) -> int:
    """A word of 32 bits, as every key of noise has."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not allowed; give 0 to {2**32 - 1}")
    return value


def lengths(text: str) -> list[int]:
    """Positive integers, separated by commas."""
    return [at_least(1)(part) for part in text.split(",")]
