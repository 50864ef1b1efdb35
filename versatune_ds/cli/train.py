"""`versatune-ds train`: fine-tune a model (many ranks: deepspeed launch/train.py --config FILE).

Fine-tunes by a configuration, on one rank, or on many when a launcher starts it on each.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--resume", choices=("auto", "never"), help="short for run.resume=...")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it


def run(args: argparse.Namespace) -> None:
    """Train; blocks until the run is finished or asked to stop."""
    from versatune_ds.config.load import load_config
    from versatune_ds.engine.faults.launcher import leave_with_launcher

    leave_with_launcher()  # before torch is imported, which takes seconds

    overrides = list(args.overrides)
    if args.resume is not None:
        overrides.append(f"run.resume={args.resume}")
    config = load_config(args.config, overrides)

    from versatune_ds.engine.train import train

    train(config)
