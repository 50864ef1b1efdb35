"""`versatune-ds report RUN...`: one self-contained HTML page about one run or several.

Works on finished, running and killed runs. Prints the path of the page.

What is not covered: measuring; the page shows what the run folders hold (docs/metrics.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb `report`."""
    parser = subparsers.add_parser(
        "report",
        help="write an HTML page with tables and pictures of one run, or comparing several",
        description=(
            "Write one self-contained HTML page: summary, weights, losses per domain, gamma and phi, "
            "shares, throughput and alarms. Several runs are drawn into the same pictures."
        ),
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run folder (`run.dir`); finished, running or killed",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        default=None,
        help="where to write the page (default: RUN/report.html; with several runs ./report.html)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page, print its path, return the exit status 0."""
    from versatune_ds.report.report import write_report

    print(write_report(args.runs, args.out))
    return 0
