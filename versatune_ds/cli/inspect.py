"""`versatune-ds inspect`: show prepared samples with the supervised part marked, length statistics and packs.

Shows what training will see: samples with the supervised part in green (in [[ ]] when the output is not a
terminal or NO_COLOR is set), length statistics per domain, and packs. Not raw rows, nor rejected ones
(rejected.jsonl in the cache has those).
"""

from __future__ import annotations

import argparse
import sys

from versatune_ds.cli import add_settings, at_least
from versatune_ds.foundations.constants import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands behind the verb."""
    add_settings(parser)
    parser.add_argument("--domain", metavar="NAME", help="show only this domain")
    parser.add_argument("--samples", type=at_least(0), default=3, metavar="N", help="samples per domain (3)")
    parser.add_argument("--packs", type=at_least(0), default=2, metavar="N", help="packs to show (2)")


def run(args: argparse.Namespace) -> int:
    """Print everything to standard output."""
    from versatune_ds.apps.inspect import inspect
    from versatune_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    for line in inspect(
        config,
        sys.stdout,
        domain=args.domain,
        samples=args.samples,
        packs=args.packs,
        config_path=args.config,
    ):
        print(line)
    return EXIT_OK
