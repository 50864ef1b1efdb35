"""`versatune-ds inspect`: prepared samples as text, their supervised part marked; lengths and packs.

What is not covered: raw rows, and rows that were rejected (rejected.jsonl in the cache has those).
"""

from __future__ import annotations

import argparse
import sys

from versatune_ds.foundations.constants import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "inspect",
        help="show prepared samples with the supervised part marked, length statistics and packs",
        description=(
            "Show what training will see: samples with the supervised part in green (in [[ ]] when the "
            "output is not a terminal or NO_COLOR is set), length statistics per domain, and packs."
        ),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings; see configs/")
    parser.add_argument("--domain", metavar="NAME", help="show only this domain")
    parser.add_argument("--samples", type=_count, default=3, metavar="N", help="samples per domain (3)")
    parser.add_argument("--packs", type=_count, default=2, metavar="N", help="packs to show (2)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )
    parser.set_defaults(run=run)


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


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give 0 or more")
    return value
