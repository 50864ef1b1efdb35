"""`versatune-ds import-config`: settings of LLaMA-Factory, axolotl or TRL as ours, printed.

Comments say what differs, and have a line for everything that could not be carried over. Run it where the
other trainer is run: paths are as seen from there. See docs/moving.md.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import at_least, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=place, metavar="FILE", help="YAML or JSON of the other trainer")
    parser.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="N", help="GPUs that will train (default: 1)"
    )


def run(args: argparse.Namespace) -> None:
    from versatune_ds.apps.move_in.convert import import_config

    print(import_config(args.file, args.ranks), end="")
