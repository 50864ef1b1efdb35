"""`versatune-ds search`: find a good fixed mixture before the run, within a budget of tokens.

Tries mixtures by short runs, or by merged adapters of single domains (section search of the settings), fits
a surface to their held-out losses, and writes RUN/search/mixture.json, which domains.initial takes, and a
page. Started again it goes on where it was. See docs/search.md.
"""

from __future__ import annotations

import argparse
import shlex

from versatune_ds.cli import add_settings

FOLDER = "search"


add_arguments = add_settings


def run(args: argparse.Namespace) -> None:
    from versatune_ds.config.load import load_config

    config = load_config(args.config, args.overrides)

    from versatune_ds.apps.search.run import search

    path = search(config, config.run.dir / FOLDER)
    print(path)
    print(f"use it: {shlex.quote(f'domains.initial={path}')} weights.strategy=constant")
