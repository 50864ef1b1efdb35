"""`versatune-ds plan-weights --history FILE`: the weights that a strategy makes of recorded losses.

No model is needed. Replays weights.jsonl of a run, or losses by domain as JSONL or CSV, through the rules of
a run. Prints a table and writes plan.png and plan.json.

What is not covered: how losses react to weights; the command says so. See docs/method.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from versatune_ds.foundations.constants import EXIT_OK, RESOLVED_CONFIG_FILE

DEFAULT_FOLDER = Path("runs/plan-weights")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "plan-weights",
        help="replay recorded losses through any weight strategy and draw the weights, without a model",
        description=(
            "Replay a loss history through the rules of a run, in several variants side by side. "
            "Settings come from --config, else from the resolved.yaml beside the history, else from "
            "defaults. See docs/method.md."
        ),
    )
    parser.add_argument(
        "--history",
        required=True,
        type=Path,
        metavar="FILE",
        help="weights.jsonl of a run, or losses by domain as JSONL or CSV",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings of a run")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="values to compare, e.g. weights.sigma=0.5,1,2; given twice: all combinations",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all variants")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, print the table and write the picture and the numbers."""
    from versatune_ds.config.variants import make_variants
    from versatune_ds.domain.controller import WeightController
    from versatune_ds.domain.history import domains_of, read_history, replay_history
    from versatune_ds.domain.reference import load_reference
    from versatune_ds.domain.table import DomainTable
    from versatune_ds.foundations.files import write_bytes_atomic, write_json_atomic
    from versatune_ds.report.weight_plans import NOTE, WeightPlan, picture, table

    history = read_history(args.history)
    beside = args.history.parent / RESOLVED_CONFIG_FILE
    config = args.config or (beside if beside.is_file() else None)
    plans = []
    for variant in make_variants(config, domains_of(history), args.overrides, args.vary):
        domains = DomainTable(variant.domains.names)
        reference = load_reference(variant.weights.reference, domains)
        controller = WeightController(domains, variant.domains, variant.weights, reference)
        plans.append(WeightPlan(variant, replay_history(history, controller, domains)))
    args.out.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(args.out / "plan.png", picture(plans))
    numbers = {
        "history": str(args.history),
        "settings": None if config is None else str(config),
        "note": NOTE,
        "variants": [plan.to_json() for plan in plans],
    }
    write_json_atomic(args.out / "plan.json", numbers)
    print(f"{len(history)} updates of {args.history}; settings: {config or 'defaults'}")
    print(table(plans))
    print(f"note: {NOTE}")
    print(f"written: {args.out / 'plan.png'}, {args.out / 'plan.json'}")
    return EXIT_OK
