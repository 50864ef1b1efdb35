"""`versatune-ds evidence`: tests, kernel and trainer against TRL on this machine, within minutes.

Stage 1 runs the tests that need a GPU, stage 2 the fused loss against its rivals, stage 3 the trainer against
TRL, stage 4, only where it is asked for, a study of mixtures. A JSON file a stage, rewritten after every
number, and a summary. On a CPU everything is tiny and its times mean nothing. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.cli import place

DEFAULT_FOLDER = Path("runs/evidence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=place, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s")
    add(
        "--minutes", type=float, default=9.0, metavar="M", help="ends within M minutes (default: %(default)g)"
    )
    add(
        "--stage",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="1 to 4; default: 1 2 3, sharing the time",
    )
    add(
        "--size",
        choices=("auto", "tiny", "small"),
        default="auto",
        help="auto: by the card's memory, tiny without one; small: a comparison with TRL for CPUs",
    )


def run(args: argparse.Namespace) -> None:
    from versatune_ds.apps.evidence.command import run_evidence
    from versatune_ds.apps.programs import ending_with_programs

    with ending_with_programs():
        print(run_evidence(args.out, args.minutes, args.stage, args.size))
