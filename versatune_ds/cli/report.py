"""`versatune-ds report`: write an HTML page with tables and pictures of one run, or comparing several.

One self-contained HTML page: summary, weights, losses per domain, gamma and phi, shares, throughput and
alarms, of finished, running and killed runs; its path is printed. Several runs are drawn into the same
pictures. What a run folder holds: docs/metrics.md.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import at_least, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="+",
        type=place,
        help="run folder (`run.dir`); finished, running or killed",
    )
    add(
        "--out",
        metavar="PATH",
        type=place,
        default=None,
        help="where to write the page (default: RUN/report.html; with several runs ./report.html)",
    )
    add(
        "--by", choices=("steps", "tokens"), default="steps", help="line runs up by optimizer steps or tokens"
    )
    add(
        "--follow",
        metavar="SECONDS",
        nargs="?",
        const=30,
        type=at_least(1),
        help="write the page every so many seconds (default: 30) until the runs are over",
    )


def run(args: argparse.Namespace) -> None:
    from versatune_ds.report.report import follow_report, write_report

    if args.follow is None:
        print(write_report(args.runs, args.out, args.by))
    else:
        print(follow_report(args.runs, args.out, args.by, args.follow))
