"""`versatune-ds inspect`: show samples with what is trained on marked, lengths and packs; or one raw row.

Shows what training will see: samples with the supervised part in green, thoughts in magenta and results of
tools in cyan (in [[ ]] and (( )) when the output is not a terminal or NO_COLOR is set), length statistics per
domain, and packs. With --row, one raw row on its way to token ids. Not rejected rows (rejected.jsonl in the
cache has those).
"""

from __future__ import annotations

import argparse
import sys

from versatune_ds.cli import add_settings, at_least, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_settings(parser)
    add("--domain", metavar="NAME", help="show only this domain")
    add("--samples", type=at_least(0), default=3, metavar="N", help="samples per domain (3)")
    add("--packs", type=at_least(0), default=2, metavar="N", help="packs to show (2)")
    add(
        "--row",
        metavar="[FILE:]N",
        help="follow line or row N of a file (default: the first) from its raw text to its token ids",
    )
    add("--html", metavar="FILE", type=place, help="write a self-contained page instead")


def run(args: argparse.Namespace) -> None:
    from versatune_ds.apps.inspect import inspect, to_lines
    from versatune_ds.apps.trace import trace
    from versatune_ds.config.load import load_config
    from versatune_ds.report.page import to_html, write_html

    config = load_config(args.config, args.overrides, to_train=False)
    if args.row is not None:
        page = trace(config, args.row, domain=args.domain)
    else:
        page = inspect(config, domain=args.domain, samples=args.samples, packs=args.packs)
    if args.html is not None:
        write_html(args.html, to_html(page), "--html")
        print(args.html)
        return
    for line in to_lines(page, sys.stdout):
        print(line)
