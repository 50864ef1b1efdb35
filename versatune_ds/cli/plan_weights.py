"""`versatune-ds plan-weights`: replay a run's losses through any weight strategy, without a model.

Replays the losses of a weights.jsonl through the rules of a run under other settings, from --config or else
from the resolved.yaml beside the history; prints what became of the weights and writes them as a run writes
its own: weights.jsonl, resolved.yaml and a report. `versatune-ds report` compares several such folders, and
`strategy: manual` trains with one. See docs/method.md. Not covered: how losses react to weights; the command
says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from versatune_ds.cli import place
from versatune_ds.foundations import constants

if TYPE_CHECKING:
    from versatune_ds.domain.controller import WeightUpdate

DEFAULT_FOLDER = Path("runs/plan-weights")
NOTE = (
    "a replay: the losses are those of the recorded run. They do not react to these weights: a domain that "
    "would get more data would learn faster than shown, and its gamma would fall sooner"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--history", required=True, type=place, metavar="FILE", help="weights.jsonl of a run")
    add("--config", type=place, metavar="FILE", help="settings of a run")
    add("--out", type=place, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win")


def run(args: argparse.Namespace) -> None:
    from versatune_ds.config.load import load_config, write_resolved
    from versatune_ds.domain.controller import WeightController
    from versatune_ds.domain.history import read_history, replay_history
    from versatune_ds.domain.reference import load_reference
    from versatune_ds.domain.table import DomainTable
    from versatune_ds.foundations.errors import ConfigError
    from versatune_ds.foundations.files import require_own, write_json_atomic, write_text_atomic
    from versatune_ds.observability.records import json_line
    from versatune_ds.report.page import SIGN
    from versatune_ds.report.report import write_report

    if (args.out / constants.METRICS_FILE).exists():
        raise ConfigError(
            f"--out {args.out} holds a run; give another folder, a replay would replace its weights"
        )
    signs = {constants.RUN_INFO_FILE: '"replay_of"', constants.WEIGHTS_FILE: '"step"'}
    require_own(args.out, signs | {constants.RESOLVED_CONFIG_FILE: "domains:", constants.REPORT_FILE: SIGN})
    history = read_history(args.history)
    settings = args.config or args.history.parent / constants.RESOLVED_CONFIG_FILE
    # the history's losses stand for whatever source they came from, and a plan applies what it computes; the
    # guard needs the losses of every held-out sample, which a history lacks
    replayed = ("weights.loss_source=train", "weights.shadow=false", "weights.guard=null")
    config = load_config(settings, [*args.overrides, *replayed])
    table = DomainTable(config.domains.names)
    reference = load_reference(config.weights.reference, table)
    controller = WeightController(table, config.domains, config.weights, reference)
    updates = replay_history(history, controller, table)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json_line(update.to_json()) for update in updates)
    write_text_atomic(args.out / constants.WEIGHTS_FILE, lines)
    write_resolved(config, args.out / constants.RESOLVED_CONFIG_FILE)
    info = {"domains": list(table.names), "replay_of": str(args.history), "note": NOTE}
    write_json_atomic(args.out / constants.RUN_INFO_FILE, info)
    print(f"{len(history)} updates of {args.history}; settings: {settings}")
    print(summary(updates))
    print(f"note: {NOTE}")
    print(write_report([args.out]))


def summary(updates: Sequence[WeightUpdate]) -> str:
    """Weights before and after by domain in %, and what happened between.

    `moved` is half the sum of absolute differences between the first and the last weights: the share of the
    batch that changed hands. Effective domains are exp(entropy) at the end.
    """
    import math
    from collections import Counter

    first, last = updates[0].after, updates[-1].after
    width = max(map(len, first))
    rows = [f"{name:{width}}  {100 * first[name]:.1f} -> {100 * last[name]:.1f} %" for name in first]
    moved = sum(abs(last[name] - first[name]) for name in first) / 2
    gates = [update.gate_open for update in updates if update.gate_open is not None]
    alarms = Counter(text.split(":")[0] for update in updates for text in update.alarms)
    facts = [f"moved {100 * moved:.1f} %", f"effective domains {math.exp(updates[-1].entropy):.2f}"]
    facts += [f"gate open {sum(gates)}/{len(gates)}"] if gates else []
    facts += [f"{key} x{count}" for key, count in alarms.items()]
    return "\n".join([*rows, "; ".join(facts)])
