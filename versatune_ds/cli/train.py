"""`versatune-ds train`: fine-tune on one rank, or on many when a launcher starts it on each."""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.foundations.constants import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model (many ranks: deepspeed launch/train.py --config FILE)",
        description="Fine-tune by a configuration. Several ranks: deepspeed launch/train.py --config FILE.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `launch/train.py` shares with this verb."""
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="YAML settings; see configs/"
    )
    parser.add_argument("--resume", choices=("auto", "never"), help="short for run.resume=...")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )


def run(args: argparse.Namespace) -> int:
    """Train; blocks until the run is finished or asked to stop."""
    from versatune_ds.config.load import load_config
    from versatune_ds.engine.faults.launcher import leave_with_launcher

    leave_with_launcher()  # before torch is imported, which takes seconds

    overrides = list(args.overrides)
    if args.resume is not None:
        overrides.append(f"run.resume={args.resume}")
    config = load_config(args.config, overrides)

    from versatune_ds.engine.train import train

    train(config, args.config)
    return EXIT_OK
