"""`versatune-ds evaluate`: held-out loss per domain of a model, run or checkpoint, and benchmark tasks.

Evaluates a model on the held-out data of a configuration: loss, standard error and perplexity per domain, and
scored answers (evaluation.generate), into evaluation.json, tables, and a radar chart. Evaluation during
training is evaluation.every_n_steps.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import add_settings, place, place_text
from versatune_ds.foundations import constants


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--model",
        type=place_text,
        metavar="MODEL",
        help="Hugging Face folder or hub name, run folder, or checkpoint folder; default: run.dir",
    )
    parser.add_argument(
        "--against",
        type=place_text,
        metavar="MODEL",
        help="compare with this model, run, checkpoint or evaluation.json (evaluated first if need be)",
    )
    parser.add_argument(
        "--tasks", type=place, metavar="FILE", help="benchmark tasks (extra eval); see configs/benchmarks/"
    )
    parser.add_argument("--out", type=place, metavar="DIR", help="target folder; default: the run folder")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables, draw the chart; 1 when a benchmark that was asked for failed."""
    from versatune_ds.config.load import load_config

    config = load_config(args.config, args.overrides)
    tasks = None
    if args.tasks is not None:
        from versatune_ds.config.benchmarks import load_benchmarks

        tasks = load_benchmarks(args.tasks, config.domains.names)

    from versatune_ds.apps.evaluate.held_out import run_evaluation

    done = run_evaluation(
        config,
        args.model or str(config.run.dir),
        against=args.against,
        tasks=tasks,
        out=args.out,
    )
    from versatune_ds.foundations import distributed

    if distributed.is_main():
        from versatune_ds.report.evaluation import show

        picture = done.out / constants.EVALUATION_PICTURE_FILE
        print(show(done.after, done.before, done.changes, picture, done.score_changes))
        print(done.out / constants.EVALUATION_FILE)
    from versatune_ds.apps.evaluate.lm_eval import NO_TASK

    not_run = done.after.provenance.get("benchmarks_not_run", {})
    failed = any(why != NO_TASK for why in not_run.values())
    return constants.EXIT_FAILURE if failed else constants.EXIT_OK
