"""`versatune-ds reference`: measure reference losses: how low each domain's held-out loss can get.

Writes reference.json for weights.reference. Default: train reference.model on each domain alone until its
held-out loss stops falling; a domain that is finished is kept when the command is started again.
"""

from __future__ import annotations

import argparse
import shlex

from versatune_ds.cli import add_settings, place, place_text
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--model",
        type=place_text,
        metavar="MODEL",
        help="take the held-out losses of this finished model or run",
    )
    how.add_argument(
        "--losses", metavar="NAME=NATS,...", help="take these numbers (nats per supervised token)"
    )
    parser.add_argument("--out", type=place, metavar="DIR", help="target folder; default: RUN/reference")


def run(args: argparse.Namespace) -> None:
    from versatune_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    out = args.out or config.run.dir / constants.REFERENCE_DIR
    given = None if args.losses is None else parse_losses(args.losses)

    from versatune_ds.apps.reference import write_reference

    path = write_reference(config, out, model=args.model, losses=given)
    if path is not None and distributed.is_main():
        print(path)
        print(f"use it: {shlex.quote(f'weights.reference={path}')}")


def parse_losses(text: str) -> dict[str, float]:
    """`law=1.9,code=0.7` as numbers by name; ConfigError for any other form."""
    losses = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not (name.strip() and equals):
            raise ConfigError(f"--losses: {part!r} is not NAME=NATS, for example law=1.9,code=0.7")
        if name.strip() in losses:
            raise ConfigError(f"--losses: {name.strip()} stands twice")
        losses[name.strip()] = number
    return losses
