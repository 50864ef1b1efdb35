"""`versatune-ds study`: compare strategies over several seeds, with tables and a report.

Takes a pretrained model, or pre-trains a small one on a skewed mixture, fine-tunes it with every arm and seed
by the trainer itself, and writes DIR/results/. Started again it keeps finished runs. See docs/study.md.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, type=place, metavar="FILE", help="study settings; see configs/studies/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that win over FILE, e.g. seeds=[1,2]"
    )


def run(args: argparse.Namespace) -> None:
    from versatune_ds.apps.study.config import load_study

    study = load_study(args.config, args.overrides)

    from versatune_ds.apps.study.run import report_study, run_study

    print(report_study(study, run_study(study), args.config))
