"""`versatune-ds search`: find a good fixed mixture before the run, within a budget of tokens.

Tries mixtures by short runs, or by merged adapters of single domains (section search of the settings), fits
a surface to their held-out losses, and writes RUN/search/mixture.json, which domains.initial takes, and a
page. Started again it goes on where it was. See docs/search.md.
"""

from __future__ import annotations

import argparse
import shlex

from versatune_ds.cli import add_settings
from versatune_ds.foundations.constants import EXIT_OK

FOLDER = "search"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Search, write the mixture and the page, print how to use it; 0 also when asked to stop."""
    from versatune_ds.config.load import load_config

    config = load_config(args.config, args.overrides)

    from versatune_ds.apps.search.run import search
    from versatune_ds.apps.study.run import StudyStopped

    try:
        path = search(config, config.run.dir / FOLDER)
    except StudyStopped as stopped:
        print(stopped)
        return EXIT_OK
    print(path)
    print(f"use it: {shlex.quote(f'domains.initial={path}')} weights.strategy=constant")
    return EXIT_OK
