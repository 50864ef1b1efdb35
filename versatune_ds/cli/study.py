"""`versatune-ds study --config FILE`: compare strategies over seeds, with tables and pictures.

Every arm is trained with every seed by the trainer itself. A second start keeps the runs that are finished.
Writes DIR/results/: index.html (one self-contained page), results.md (its tables) and summary.json.

What is not covered: what a study file may hold (`versatune_ds/apps/study/config.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.foundations.constants import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "study",
        help="compare strategies over several seeds and write a page with tables and pictures",
        description=(
            "Pre-train a small base model on a skewed mixture, fine-tune it with every arm and seed, and "
            "write one page. Started again it keeps finished runs. See docs/study.md."
        ),
    )
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="study settings; see configs/studies/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that win over FILE, e.g. seeds=[1,2]"
    )
    parser.set_defaults(run=run)


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
