"""`versatune-ds export`: write a checkpoint as a Hugging Face folder.

Safetensors, config and tokenizer, on one CPU, without a process group; of a run with `model.adapter` an
adapter folder for peft.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.cli import place
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import ConfigError, StateError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=place, metavar="RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step",
        type=int,
        help="checkpoint to export; default: the best one (evaluation.select), or else the newest",
    )
    which.add_argument("--newest", action="store_true", help="the newest sound checkpoint, not the best one")
    add("--out", type=place, help="target folder; default: RUN/model-step-N")
    add("--ema", action="store_true", help="the average of the weights (optimizer.ema_decay)")
    add("--merge", action="store_true", help="the base model with the adapter added")
    add(
        "--push",
        metavar="OWNER/NAME",
        help="upload it to the Hugging Face hub with a model card; RUN/model as it is, if there is one",
    )
    add("--public", action="store_true", help="with --push: a new repository is open to all")


def run(args: argparse.Namespace) -> None:
    if args.public and args.push is None:
        raise ConfigError("--public: say where to with --push OWNER/NAME")
    finished = args.run_dir / constants.EXPORT_DIR
    asked = args.step is not None or args.newest or args.out or args.merge or args.ema
    as_it_is = not asked and finished.is_dir()
    target, step = (finished, None) if args.push and as_it_is else export(args)
    print(target)
    if args.push:
        from versatune_ds.apps.push import push

        print(push(args.run_dir, target, args.push, step=step, public=args.public))


def export(args: argparse.Namespace) -> tuple[Path, int]:
    """Write a checkpoint as a folder; returns it, and the checkpoint's step."""
    from versatune_ds.engine.checkpointing import folder as folders
    from versatune_ds.engine.checkpointing.hf_export import export_from_run

    if not (args.run_dir / constants.RESOLVED_CONFIG_FILE).is_file():
        raise ConfigError(f"{args.run_dir} is not a run folder: it has no {constants.RESOLVED_CONFIG_FILE}")
    folder = args.run_dir / constants.CHECKPOINTS_DIR
    if args.step is None:
        find = folders.newest_sound_checkpoint if args.newest else folders.best_or_newest
        checkpoint = find(folder)
    else:
        checkpoint = folder / folders.checkpoint_name(args.step)
    if checkpoint is None or not checkpoint.is_dir():
        raise StateError(f"{folder} holds no such checkpoint; checkpoint.every_n_steps makes them")
    if args.step is not None:
        folders.require_sound(checkpoint)
    kind = f"{'-merged' if args.merge else ''}{'-ema' if args.ema else ''}"
    target = args.out or args.run_dir / f"model-{checkpoint.name}{kind}"
    export_from_run(args.run_dir, checkpoint, target, args.merge, args.ema)
    return target, folders.step_of(checkpoint)
