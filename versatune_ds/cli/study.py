"""`versatune-ds study`: compare strategies over several seeds, with tables and a report.

Takes a pretrained model, or pre-trains a small one on a skewed mixture, fine-tunes it with every arm and seed
by the trainer itself, and writes DIR/results/. Started again it keeps finished runs. See docs/study.md.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import place
from versatune_ds.foundations.constants import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, type=place, metavar="FILE", help="study settings; see configs/studies/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that win over FILE, e.g. seeds=[1,2]"
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing and write the page; 0 also when asked to stop."""
    from versatune_ds.apps.study.config import load_study

    study = load_study(args.config, args.overrides)

    from versatune_ds.apps.study.run import StudyStopped, report_study, run_study

    try:
        runs = run_study(study)
    except StudyStopped as stopped:
        print(stopped)
        return EXIT_OK
    print(report_study(study, runs, args.config))
    return EXIT_OK
