"""`mdseq export RUN --output DIR`: the weights of a run, to load without DeepSpeed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdseq.cli.arguments import number_between

if TYPE_CHECKING:
    from mdseq.model.saved import WhichWeights


def add_command(commands: Any) -> None:
    command = commands.add_parser("export", help="weights as safetensors, with what is needed to use them")
    command.set_defaults(command=export)
    command.add_argument("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the moving average of the weights, as mdseq generate uses; --no-ema: those that training had reached",
    )
    command.add_argument(
        "--shard_gib",
        type=number_between(0, least_allowed=False),
        default=4.0,
        metavar="X",
        help="GiB of a file, and of memory; default 4",
    )


def export(options: argparse.Namespace) -> None:
    from mdseq.engine.export import export_model

    which: WhichWeights = "average" if options.ema else "weights"
    checkpoint = export_model(options.run, options.output, which, round(options.shard_gib * 2**30))
    print(f"{options.output} holds the {which} of {checkpoint}")
