"""`versatune-ds detect`: what a base model knows: domain shares of the texts that it writes by itself.

Generates texts from the BOS token alone, lets a judge tell their domains, and writes the mean as
knowledge.json, which domains.initial takes. Goes on where it was stopped or killed. How it is done:
`apps/detect`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.cli import place

DEFAULT_FOLDER = "detect"
DEFAULT_PICTURE = Path("knowledge.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=place, metavar="FILE", help="YAML settings; see configs/")
    what.add_argument(
        "--compare", nargs="+", type=place, metavar="FILE", help="only draw these knowledge.json files"
    )
    add("--model", metavar="FOLDER", help="short for detect.model=...")
    add(
        "--out",
        type=place,
        metavar="PATH",
        help="folder of the files (default: run.dir/detect); with --compare the picture (./knowledge.png)",
    )
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE")


def run(args: argparse.Namespace) -> None:
    if args.compare is not None:
        from versatune_ds.foundations.files import require_own
        from versatune_ds.report.figures import SOFTWARE
        from versatune_ds.report.knowledge import draw_knowledge

        picture = args.out or DEFAULT_PICTURE
        require_own(picture.parent, {picture.name: SOFTWARE})
        draw_knowledge(args.compare, picture)
        print(picture)
        return
    from versatune_ds.config.load import load_config
    from versatune_ds.engine.faults.launcher import leave_with_launcher

    leave_with_launcher()
    overrides = list(args.overrides)
    if args.model is not None:
        overrides.append(f"detect.model={args.model}")
    config = load_config(args.config, overrides)

    from versatune_ds.apps.detect.run import detect
    from versatune_ds.foundations import distributed

    path = detect(config, args.out or config.run.dir / DEFAULT_FOLDER)
    if path is not None and distributed.is_main():
        print(path)
