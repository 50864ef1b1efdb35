"""`versatune-ds doctor`: system, driver, versions, devices, backends, limits, disk, known traps.

Looks at this machine before a run, and is what to paste into a bug report. Leaves with 1 when something needs
attention.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.cli import place
from versatune_ds.foundations.constants import EXIT_FAILURE, EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", nargs="?", type=place, default=Path("."), help="where runs will be written"
    )
    parser.add_argument("--hostfile", type=place, metavar="FILE", help="compare clocks with these hosts")


def run(args: argparse.Namespace) -> int:
    from versatune_ds.apps.doctor import examine

    hosts = []
    if args.hostfile is not None:
        from versatune_ds.apps.host_checks import hosts_of

        hosts = hosts_of(args.hostfile)
    findings = examine(args.run_dir, hosts)
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        print(f"{'!!' if finding.is_problem else '  '} {finding.topic:<{width}}  {finding.text}")
    problems = sum(finding.is_problem for finding in findings)
    print(f"{problems} problem(s)" if problems else "no problems found")
    return EXIT_FAILURE if problems else EXIT_OK
