"""`versatune-ds report`: write an HTML page with tables and pictures of one run, or comparing several.

One self-contained HTML page: summary, weights, losses per domain, gamma and phi, shares, throughput and
alarms, of finished, running and killed runs; its path is printed. Several runs are drawn into the same
pictures. What a run folder holds: docs/metrics.md.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands behind the verb."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=place,
        help="run folder (`run.dir`); finished, running or killed",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=place,
        default=None,
        help="where to write the page (default: RUN/report.html; with several runs ./report.html)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, print its path, return the exit status 0."""
    from versatune_ds.report.report import write_report

    print(write_report(args.runs, args.out))
    return 0
