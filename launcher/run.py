"""Train: `deepspeed launcher/run.py --ds_config ds_configs/zero3_experts.json --spec quickstart --data data/code`.

Also runs as one process, `python launcher/run.py ...`. Everything is checked before DeepSpeed is loaded: a mistake
gives one message and exit status 2, and nothing is written.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# As a script, python puts launcher/ on the path; the packages stand beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mdseq.errors import Separated, UserError
from mdseq.spec import load_spec, preset_names

if TYPE_CHECKING:
    from mdseq.train.start import RunPlan

EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_OUT_OF_MEMORY = 2, 3, 4
EXIT_SEPARATED = 6  # ranks, or nodes, from each other; another start may find all of them
EXIT_PREFLIGHT_FAILED = 7
RANK_0_SECONDS = 10.0  # launchers kill the others when one ends, and rank 0 has to tell why


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    rank = int(os.environ.get("RANK", "0"))
    try:
        if options.preflight and not options.dry_run and not _passes_preflight(options):
            return EXIT_PREFLIGHT_FAILED
        plan = _plan(options, show=rank == 0)
    except Separated as error:
        return tell_separated(error, rank)
    except UserError as error:
        return tell_mistake(error, rank)
    if plan is None:
        return 0

    from mdseq.train.guard import TrainingDiverged
    from mdseq.train.signals import stop_status
    from mdseq.train.start import train

    try:
        signal_number = train(plan)
    except UserError as error:  # of this rank alone, perhaps
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Separated as error:
        return tell_separated(error, rank)
    except TrainingDiverged as error:
        if rank == 0:
            print(f"error: {error}; {_where_to_go_on(plan)}", file=sys.stderr, flush=True)
        return EXIT_DIVERGED
    except MemoryError as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_OUT_OF_MEMORY
    except KeyboardInterrupt:  # before the first step
        return stop_status(signal.SIGINT)
    if not signal_number:
        return 0
    if rank == 0:
        name = signal.Signals(signal_number).name
        print(f"stopped by {name}; the same command continues", file=sys.stderr, flush=True)
    return stop_status(signal_number)


def tell_mistake(error: UserError, rank: int) -> int:
    """Print a mistake that every rank has found, once; the exit status."""
    if rank:
        time.sleep(RANK_0_SECONDS)
        return EXIT_USER_ERROR
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def tell_separated(error: Separated, rank: int) -> int:
    """Print why ranks are without each other; the exit status."""
    print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return EXIT_SEPARATED


def run_folder(output: Path | None, spec: Path | None) -> Path:
    """Where a run goes: `--output`, or a folder with the name of the spec."""
    return output if output is not None else Path("runs") / (spec.stem if spec is not None else "default")


def _where_to_go_on(plan: RunPlan) -> str:
    """What is left of a run that has diverged."""
    from mdseq.engine.checkpoint import whole_checkpoints

    checkpoints = whole_checkpoints(plan.run.checkpoints)
    if not checkpoints:
        return "there is no checkpoint yet; lower optimiser.learning_rate, or look at the rows named above"
    return (
        f"the last good checkpoint is {checkpoints[-1][0]}; continue it into another --output with a lower "
        "optimiser.learning_rate, or look at the rows named above"
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launcher/run.py", description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="first check all ranks, as launcher/preflight.py does; stop if they fail",
    )
    parser.add_argument("--dry_run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; we read LOCAL_RANK
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the spec")
    return parser.parse_intermixed_args(arguments)  # options may stand between overrides


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """What a run is called, and where its data and results are."""
    parser.add_argument(
        "--spec",
        type=Path,
        metavar="TOML",
        help=f"a file, or one of {', '.join(preset_names())}; default: all defaults",
    )
    parser.add_argument("--data", metavar="DIR", help="dataset made by `make prep` (the spec's data.path)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="run folder; default runs/<name of the spec>")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What decides on a run, but for changes to its spec."""
    parser.add_argument("--ds_config", type=Path, required=True, metavar="JSON", help="see ds_configs/README.md")
    add_place_options(parser)
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="continue the newest checkpoint of the run folder"
    )
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="continue a checkpoint of another spec or dataset, if its weights fit",
    )


def _overrides(options: argparse.Namespace) -> list[str]:
    given = list(options.overrides)
    return given if options.data is None else [*given, f"data.path={options.data}"]


def _passes_preflight(options: argparse.Namespace) -> bool:
    """Before anything else is checked: it names the nodes that see no dataset, or cannot write."""
    spec = load_spec(options.spec, _overrides(options)).spec

    from launcher.preflight import preflight

    return preflight(spec.data.path, run_folder(options.output, options.spec), minima={})


def _plan(options: argparse.Namespace, show: bool) -> RunPlan | None:
    """Check everything; None where a dry run was all that was asked for."""
    resolved = load_spec(options.spec, _overrides(options))

    import torch

    from mdseq.engine.config import load_engine_config

    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    engine = load_engine_config(options.ds_config, resolved.spec, num_ranks, torch.cuda.is_available())
    if options.dry_run:
        from mdseq.train.dry_run import print_dry_run

        if show:
            print_dry_run(resolved, engine)
        return None

    from mdseq.train.start import plan_run

    output = run_folder(options.output, options.spec)
    return plan_run(resolved.spec, engine, output, options.resume, options.allow_changes)


def leave(status: int) -> NoReturn:
    """End the process as it is.

    While an interpreter is torn down, gloo's threads may still be letting go of the last collective's tensors, and need
    it: torch 2.13 then aborts, one time in some dozens.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
