"""The tables of a study, results.md, from summary.json.

What is not covered: the numbers (`results`), the curves of its runs (`versatune-ds report`), and what to make
of it (docs/study.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from versatune_ds.report.measures import MINUS, NOTHING, number, percent
from versatune_ds.report.page import Page, PageSection, Table, to_markdown

Json = Mapping[str, Any]


def study_tables(summary: Json) -> str:
    """Base model, strategies and expansions as Markdown; `summary` is what `report_study` writes."""
    seeds = summary["arms"][summary["baselines"][0]]["seeds"]
    title = f"Study: {len(summary['arms'])} arms, number of seeds: {len(seeds)}"
    expansions = [expansion_table(target, arms) for target, arms in summary["expansions"].items()]
    note = (
        "Losses are held-out nats per supervised token. A change is relative to the base model, negative "
        "is better, and the mean gives every domain the same weight. Intervals are 95 % t intervals over "
        "seeds (the order of samples); differences are taken seed by seed. Forgetting is the mean over the "
        "domains other than the target of their rises; a domain that gained counts as 0."
    )
    objectives = [objective_table(name, summary) for name in summary["provenance"]["study"]["objectives"]]
    strategies = [*strategy_tables(summary), *objectives, *expansions]
    tables = [start_table(summary), *strategies, *score_tables(summary)]
    return to_markdown(Page(title, [PageSection("study", "", note, tables=tables)], provenance(summary)))


def provenance(summary: Json) -> str:
    """When, on what and from which settings; the model and its mixture."""
    made = summary["provenance"]
    hardware, study = made["hardware"], made["study"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = f"{hardware['cpu_count']} CPU cores" if hardware["device"] == "CPU" else hardware["device"]
    pretraining, source = study["pretraining"], study["model"].get("source")
    start = pretraining["mixture"] if pretraining else study["mixture"]
    if isinstance(start, dict):
        start = ", ".join(f"{name} {100 * p:g} %" for name, p in start.items())
    model = f"pretrained ({source}), fine-tuning starts from {start}" if source else f"pre-trained on {start}"
    return (
        f"{made['date']}; {device}, {made['workers']} runs at a time; {versions}; commit "
        f"{', '.join(made['commits'])}. Settings: {made['config']}. {made['runs']} runs took "
        f"{made['cpu_s'] / 60:.0f} minutes of CPU time and {made['run_s'] / 60:.0f} minutes of wall time "
        f"added up; the last call of the command took {made['wall_s'] / 60:.0f} minutes. Model: "
        f"{made['num_parameters'] / 1e6:.1f} M parameters, {study['model']['dtype']}, {model}."
    )


def start_table(summary: Json) -> Table:
    """The base model: its losses, the reference losses and gamma."""
    facts = (("base model", "base_loss"), ("reference", "reference"), ("gamma of the base", "gamma"))
    domains = summary["domains"]
    return Table(
        ["", *domains], [(label, [number(summary[key][d]) for d in domains]) for label, key in facts]
    )


def unspecialised(summary: Json) -> Json:
    """The arms that are no expansion's, by name."""
    members = {arm for arms in summary["expansions"].values() for arm in arms}
    return {name: arm for name, arm in summary["arms"].items() if name not in members}


def strategy_tables(summary: Json) -> list[Table]:
    """Changes of every arm without a target, how far its weights moved, and differences from baselines."""
    baselines, domains = summary["baselines"], summary["domains"]
    changes, against = [], []
    for name, arm in unspecialised(summary).items():
        others = [NOTHING if name == b else signed(arm["against"][b]["mean_change"], 2) for b in baselines]
        by_domain = [signed(arm["domain_change"][d], 1, " %") for d in domains]
        moved = percent(arm["weights"]["moved"])
        changes.append((name, [signed(arm["mean_change"], 2, " %"), *others, moved, *by_domain]))
        if name != baselines[0]:
            differences = arm["against"][baselines[0]]["domain_change"]
            against.append((name, [signed(differences[d], 2) for d in domains]))
    head = ["arm", "mean change", *(f"against {b} (points)" for b in baselines), "weights moved", *domains]
    caption = f"Change against {baselines[0]} by domain, in percentage points"
    return [Table(head, changes, "Strategies"), Table(["arm", *domains], against, caption)]


def objective_table(objective: str, summary: Json) -> Table:
    """Change of one objective by arm, without those of an expansion."""
    baselines, rows = summary["baselines"], []
    for name, arm in unspecialised(summary).items():
        others = [
            NOTHING if name == b else signed(arm["against"][b]["objectives"][objective], 2) for b in baselines
        ]
        rows.append((name, [signed(arm["objectives"][objective], 2, " %"), *others]))
    weights = summary["provenance"]["study"]["objectives"][objective]
    caption = f"Objective {objective}: " + ", ".join(f"{name} {o:g}" for name, o in weights.items())
    return Table(["arm", "change", *(f"against {b} (points)" for b in baselines)], rows, caption)


def expansion_table(target: str, arms: Json) -> Table:
    """Gain in the target and loss in the other domains."""
    columns = ("target_change", "others_change", "forgetting", "worst_other")
    head = ["arm", f"tokens of {target}", f"{target}: change", "others: mean change", "others: forgetting"]
    rows = [
        (name, [percent(arm["target_share"]), *(signed(arm[key], 2, " %") for key in columns)])
        for name, arm in arms.items()
    ]
    return Table([*head, "worst other"], rows, f"Expansion of {target}")


def score_tables(summary: Json) -> list[Table]:
    """Scores of the models' own answers; none where no run was asked."""
    before = summary["base_score"]
    if not before:
        return []
    rows = [("base model", [percent(score) for score in before.values()])]
    for name, arm in summary["arms"].items():
        scores = arm["domain_score"]
        cells = [signed(scores[d], 1, " %").lstrip("+") if d in scores else NOTHING for d in before]
        rows.append((name, cells))
    return [Table(["arm", *before], rows, "Scores of held-out answers after the last step")]


def signed(value: Mapping[str, float | None], digits: int, unit: str = "") -> str:
    """`-1.23 ± 0.45`, in percent or percentage points, with a sign."""
    mean, half = value["mean"], value["half_width"]
    text = f"{100 * (math.nan if mean is None else mean):+.{digits}f}".replace("-", MINUS)
    return text + ("" if half is None else f" ± {100 * half:.{digits}f}") + unit
