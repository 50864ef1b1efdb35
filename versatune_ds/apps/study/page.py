"""What a study's page says: its sections, from summary.json, for the report's page writer.

Written are summary.json with all numbers, results.md with the tables and index.html, the same with figures.

What is not covered: the numbers (`results`), the curves of all runs (`versatune-ds report` over their
folders), and what to make of it (docs/study.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from versatune_ds.foundations.files import write_json_atomic, write_text_atomic
from versatune_ds.report.figures import Row, row_chart
from versatune_ds.report.measures import MINUS, NOTHING, number, percent
from versatune_ds.report.page import Page, PageSection, Picture, Table, to_html, to_markdown
from versatune_ds.report.report import alarms_section, signals_section, weights_section
from versatune_ds.report.runs import RunData

SUMMARY_FILE, MARKDOWN_FILE, PAGE_FILE = "summary.json", "results.md", "index.html"
FIXED_STRATEGIES = ("uniform", "inverse", "constant")

Json = Mapping[str, Any]


def write_results(summary: Json, runs: Sequence[RunData], folder: Path) -> Path:
    """Write summary.json, results.md and index.html; returns the path of the last.

    Args:
        summary: all numbers.
        runs: those whose weights and what moved them are drawn, as in a report.
        folder: made when it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = [section for make in SECTIONS if (section := make(summary)) is not None]
    if runs:
        sections += [make(runs) for make in (weights_section, signals_section, alarms_section)]
    page = Page(
        title=f"Study: {len(summary['arms'])} arms, number of seeds: {len(_seeds(summary))}",
        lead=_provenance(summary),
        legend=[run.label for run in runs],
        sections=sections,
    )
    write_json_atomic(folder / SUMMARY_FILE, summary)
    write_text_atomic(folder / MARKDOWN_FILE, to_markdown(page))
    write_text_atomic(folder / PAGE_FILE, to_html(page))
    return folder / PAGE_FILE


def _provenance(summary: Json) -> str:
    made = summary["provenance"]
    hardware = made["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = f"{hardware['cpu_count']} CPU cores" if hardware["device"] == "CPU" else hardware["device"]
    return (
        f"{made['date']}; {device}, {made['workers']} runs at a time; {versions}; commit "
        f"{', '.join(made['commits'])}. Settings: {made['config']}. {made['runs']} runs took "
        f"{made['cpu_s'] / 60:.0f} minutes of CPU time and {made['run_s'] / 60:.0f} minutes of wall time "
        f"added up; the last call of the command took {made['wall_s'] / 60:.0f} minutes."
    )


def _start(summary: Json) -> PageSection:
    """The base model, and what is measured."""
    made = summary["provenance"]
    study, domains = made["study"], summary["domains"]
    settings, pretraining = study["settings"], study["pretraining"]
    steps = pretraining["settings"].get("train", settings["train"])["max_steps"]
    tokens = summary["arms"][summary["baselines"][0]]["tokens"]["mean"]
    mixture = ", ".join(f"{name} {100 * share:g} %" for name, share in pretraining["mixture"].items())
    lead = (
        f"Model: {made['num_parameters'] / 1e6:.1f} M parameters, {study['model']['dtype']}, pre-trained "
        f"for {steps} steps on the mixture {mixture}. Every fine-tuning run: "
        f"{settings['train']['max_steps']} steps, {tokens:,.0f} tokens on average, weights updated every "
        f"{settings['weights']['every_n_steps']} steps. Seeds: {', '.join(map(str, _seeds(summary)))}."
    )
    note = (
        "Losses are held-out nats per supervised token. A change is relative to the base model, negative "
        "is better, and the mean gives every domain the same weight. Intervals are 95 % t intervals over "
        "seeds (the order of samples); differences are taken seed by seed."
    )
    facts = (("base model", "base_loss"), ("reference", "reference"), ("gamma of the base", "gamma"))
    rows = [(label, [number(summary[key][d]) for d in domains]) for label, key in facts]
    return PageSection("start", "Start", lead, tables=[Table(["", *domains], rows)], notes=[note])


def _strategies(summary: Json) -> PageSection:
    baselines, domains = summary["baselines"], summary["domains"]
    specialised = {arm for arms in summary["expansions"].values() for arm in arms}
    arms = {name: arm for name, arm in summary["arms"].items() if name not in specialised}
    changes = [
        (
            name,
            [
                _signed(arm["mean_change"], 2, " %"),
                *(NOTHING if name == b else _signed(arm["against"][b]["mean_change"], 2) for b in baselines),
                *(_signed(arm["domain_change"][d], 1, " %") for d in domains),
            ],
        )
        for name, arm in arms.items()
    ]
    against = [
        (name, [_signed(arm["against"][baselines[0]]["domain_change"][d], 2) for d in domains])
        for name, arm in arms.items()
        if name != baselines[0]
    ]
    head = ["arm", "mean change", *(f"against {name} (points)" for name in baselines), *domains]
    caption = f"Change against {baselines[0]} by domain, in percentage points"
    tables = [Table(head, changes), Table(["arm", *domains], against, caption)]
    return PageSection("strategies", "Strategies", pictures=[_change_picture(arms)], tables=tables)


def _change_picture(arms: Json) -> Picture:
    rows = []
    for name, arm in arms.items():
        mean, half = arm["mean_change"]["mean"], arm["mean_change"]["half_width"] or 0.0
        color = 0 if name in FIXED_STRATEGIES else 1
        rows.append(Row(name=name, color=color, marks=[mean], span=(mean - half, mean + half)))
    low, high = min(row.span[0] for row in rows), max(row.span[1] for row in rows)
    axis = (min(1.05 * low, 0.0), max(1.05 * high, 0.0)), "mean relative change of the held-out loss"
    note = "with 95 % intervals over the seeds; fixed mixtures in the first colour"
    title = "Mean change by strategy"
    return Picture(title, row_chart(title, rows, *axis, width=560), note=note)


def _expansions(summary: Json) -> PageSection | None:
    columns = ("target_change", "others_change", "forgetting", "worst_other")
    tables = [
        Table(
            ["arm", f"tokens of {target}", f"{target}: change", "others: mean change", "others: forgetting",
             "worst other"],
            [
                (name, [percent(arm["target_share"]), *(_signed(arm[key], 2, " %") for key in columns)])
                for name, arm in arms.items()
            ],
            f"Expansion of {target}",
        )
        for target, arms in summary["expansions"].items()
    ]  # fmt: skip
    note = "Forgetting is the mean over the other domains of their rises; a domain that gained counts as 0."
    return PageSection("expansions", "Expansions", tables=tables, notes=[note]) if tables else None


def _movement(summary: Json) -> PageSection | None:
    """How far weights moved; arms whose weights stand still are left out."""
    moving = {name: arm["weights"] for name, arm in summary["arms"].items() if arm["weights"]["moved"] > 0}
    lead = (
        "Moved: half the sum of absolute differences between first and last weights. First and last weights "
        "in %, means over the seeds. What moved them in the runs of the first seed follows; "
        "`versatune-ds report` shows any others."
    )
    rows = [
        (
            name,
            [
                percent(weights["moved"]),
                percent(weights["gate_open"], 0),
                *(
                    f"{100 * weights['initial'][d]:.1f}, {100 * weights['final'][d]:.1f}"
                    for d in weights["final"]
                ),
            ],
        )
        for name, weights in moving.items()
    ]
    table = Table(["arm", "moved", "gate open", *summary["domains"]], rows)
    return PageSection("moved", "Movement", lead, tables=[table]) if moving else None


SECTIONS: tuple[Callable[[Json], PageSection | None], ...] = (_start, _strategies, _expansions, _movement)


def _seeds(summary: Json) -> list[int]:
    seeds: list[int] = summary["arms"][summary["baselines"][0]]["seeds"]
    return seeds


def _signed(value: Mapping[str, float | None], digits: int, unit: str = "") -> str:
    """`-1.23 ± 0.45`, in percent or percentage points, with a sign."""
    mean, half = value["mean"], value["half_width"]
    text = f"{100 * (math.nan if mean is None else mean):+.{digits}f}".replace("-", MINUS)
    return text + ("" if half is None else f" ± {100 * half:.{digits}f}") + unit
