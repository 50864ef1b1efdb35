"""The page of a study: results.md with pictures beside it, and the same as one self-contained index.html.

Both are written from one list of blocks (heading, text, table, picture), and all numbers of it stand in
summary.json.

What is not covered: the numbers (`study_results`), and what to make of them (docs/study.md).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from versatune_ds.foundations.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from versatune_ds.report.measures import NOTHING, number, percent
from versatune_ds.report.pictures import Bar, Panel, bar_rows, weight_panels

SUMMARY_FILE, MARKDOWN_FILE, PAGE_FILE = "summary.json", "results.md", "index.html"
MINUS = "\u2212"


@dataclass(frozen=True)
class Heading:
    """Title of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file of the results folder."""

    file: str
    alt: str
    png: bytes


Block = Heading | Text | Table | Picture


def write_results(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write summary.json, results.md, the pictures and index.html; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Study: {len(summary['arms'])} arms, number of seeds: {len(_seeds(summary))}"
    blocks = page_blocks(summary)
    for block in blocks:
        if isinstance(block, Picture):
            write_bytes_atomic(folder / block.file, block.png)
    write_json_atomic(folder / SUMMARY_FILE, summary)
    write_text_atomic(folder / MARKDOWN_FILE, to_markdown(title, blocks))
    write_text_atomic(folder / PAGE_FILE, to_html(title, blocks))
    return folder / PAGE_FILE


def page_blocks(summary: Mapping[str, Any]) -> list[Block]:
    """All blocks of the page, in order."""
    return [
        *_provenance(summary),
        *_strategies(summary),
        *_tuning(summary),
        *_expansions(summary),
        *_reasons(summary),
        *_paths(summary),
    ]


def _provenance(summary: Mapping[str, Any]) -> list[Block]:
    made = summary["provenance"]
    study, hardware = made["study"], made["hardware"]
    settings = study["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = f"{hardware['cpu_count']} CPU cores" if hardware["device"] == "CPU" else hardware["device"]
    pretraining = study["pretraining"]
    steps = pretraining["settings"].get("train", settings["train"])["max_steps"]
    tokens = summary["arms"][summary["baselines"][0]]["tokens"]["mean"]
    return [
        Text(
            f"{made['date']}; {device}, {made['workers']} runs at a time; {versions}; commit "
            f"{', '.join(made['commits'])}. Settings: `{made['config']}`. {made['runs']} runs took "
            f"{made['cpu_s'] / 60:.0f} minutes of CPU time and {made['run_s'] / 60:.0f} minutes of wall time "
            f"added up; the last call of the command took "
            f"{made['wall_s'] / 60:.0f} minutes."
        ),
        Text(
            f"Model: {made['num_parameters'] / 1e6:.1f} M parameters, {study['model']['dtype']}, pre-trained "
            f"for {steps} steps on the mixture {_shares(pretraining['mixture'])}. Every fine-tuning run: "
            f"{settings['train']['max_steps']} steps, {tokens:,.0f} tokens on average, weights updated every "
            f"{settings['weights']['every_n_steps']} steps. Seeds: {', '.join(map(str, _seeds(summary)))}."
        ),
        Text(
            "Losses are held-out nats per supervised token. A change is relative to the base model, negative "
            "is better, and the mean gives every domain the same weight. Intervals are 95 % t intervals over "
            "seeds (the order of samples); differences are taken seed by seed."
        ),
        Table(
            ["", *summary["domains"]],
            [
                ["base model", *(number(summary["base_loss"][d], 3) for d in summary["domains"])],
                ["reference", *(number(summary["reference"][d], 3) for d in summary["domains"])],
                ["gamma of the base", *(number(summary["gamma"][d], 3) for d in summary["domains"])],
            ],
        ),
    ]


def _strategies(summary: Mapping[str, Any]) -> list[Block]:
    baselines = summary["baselines"]
    specialised = {arm for arms in summary["expansions"].values() for arm in arms}
    arms = {name: arm for name, arm in summary["arms"].items() if name not in specialised}
    arms |= {f"{name} (tuned)": arm for name, arm in summary["confirmed"].items()}
    bars = [
        Bar(name, arm["mean_change"]["mean"], arm["mean_change"]["half_width"], group=_group(name))
        for name, arm in arms.items()
    ]
    return [
        Heading("Strategies"),
        Table(
            ["arm", "mean change", *(f"against {name} (points)" for name in baselines), *summary["domains"]],
            [
                [
                    name,
                    _percent(arm["mean_change"], 2),
                    *(_against(arm, name, base) for base in baselines),
                    *(_percent(arm["domain_change"][d], 1) for d in summary["domains"]),
                ]
                for name, arm in arms.items()
            ],
        ),
        Picture(
            "strategies.png",
            "mean change of the held-out loss by strategy",
            bar_rows(bars, "mean relative change of the held-out loss (95 % interval over seeds)"),
        ),
        Text(f"Change against {baselines[0]} by domain, in percentage points:"),
        Table(
            ["arm", *summary["domains"]],
            [
                [
                    name,
                    *(_points(arm["against"][baselines[0]]["domain_change"][d]) for d in summary["domains"]),
                ]
                for name, arm in arms.items()
                if name != baselines[0]
            ],
        ),
    ]


def _tuning(summary: Mapping[str, Any]) -> list[Block]:
    if not summary["tuning"]:
        return []
    [winner] = summary["confirmed"]
    confirmed = summary["confirmed"][winner]
    against = ", ".join(
        f"against {name} {_points(found['mean_change'])} points"
        for name, found in confirmed["against"].items()
    )
    seeds = next(iter(summary["tuning"].values()))["seeds"]
    return [
        Heading("Search for a better setting"),
        Text(
            f"Candidates on the tuning seeds {', '.join(map(str, seeds))}; the one with the lowest mean "
            f"change, {winner}, was then trained with the seeds of the study: mean change "
            f"{_percent(confirmed['mean_change'], 2)}; {against}."
        ),
        Table(
            ["candidate", "mean change", "weights moved"],
            [
                [name, _percent(arm["mean_change"], 2), percent(arm["weights"]["moved"], 1)]
                for name, arm in summary["tuning"].items()
            ],
        ),
    ]


def _expansions(summary: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for target, arms in summary["expansions"].items():
        blocks += [
            Heading(f"Expansion of {target}"),
            Table(
                [
                    "arm",
                    f"tokens of {target}",
                    f"{target}: change",
                    "others: mean change",
                    "others: forgetting",
                    "worst other",
                ],
                [
                    [
                        name,
                        percent(arm["target_share"], 1),
                        _percent(arm["target_change"], 2),
                        _percent(arm["others_change"], 2),
                        _percent(arm["forgetting"], 2),
                        _percent(arm["worst_other"], 2),
                    ]
                    for name, arm in arms.items()
                ],
            ),
        ]
    if blocks:
        blocks.append(
            Text(
                "Forgetting is the mean over the other domains of their rises; a domain that gained counts "
                "as 0."
            )
        )
    return blocks


def _reasons(summary: Mapping[str, Any]) -> list[Block]:
    moving = {
        name: arm["weights"]
        for name, arm in {**summary["arms"], **summary["confirmed"]}.items()
        if arm["weights"]["moved"] > 0
    }
    rows = [
        [
            name,
            str(weights["updates"]),
            percent(weights["moved"], 1),
            NOTHING if weights["gate_open"] is None else percent(weights["gate_open"], 0),
            NOTHING if weights["rises"] is None else percent(weights["rises"], 0),
            ", ".join(f"{key} x{count}" for key, count in weights["alarms"].items()) or NOTHING,
        ]
        for name, weights in moving.items()
    ]
    return [
        Heading("Why weights moved as they did"),
        Text(
            "Moved: half the sum of absolute differences between first and last weights. Rises: share of "
            "windows in which a domain's loss was above the one before (phi > 0). Alarms over all seeds."
        ),
        Table(["arm", "updates", "moved", "gate open", "rises", "alarms"], rows),
        Text("Mean gamma by domain, and in brackets the standard error of a window's loss over that loss:"),
        Table(
            ["arm", *summary["domains"]],
            [
                [
                    name,
                    *(
                        f"{number(weights['gamma'][d], 3)} ({percent(weights['noise'][d], 1)})"
                        for d in summary["domains"]
                    ),
                ]
                for name, weights in moving.items()
            ],
        ),
    ]


def _paths(summary: Mapping[str, Any]) -> list[Block]:
    arms = {
        name: arm
        for name, arm in {**summary["arms"], **summary["confirmed"]}.items()
        if arm["weights"]["moved"] > 0
    }
    if not arms:
        return []
    panels = [Panel(name, arm["weights"]["steps"], arm["weights"]["paths"]) for name, arm in arms.items()]
    return [
        Heading("Paths of the weights"),
        Picture("weights.png", "weights by domain over optimizer steps", weight_panels(panels)),
        Text("Means over the seeds; arms whose weights stand still are left out."),
        Table(
            ["arm", *(f"{d}: first, last (%)" for d in summary["domains"])],
            [
                [name, *(_first_last(arm["weights"], d) for d in summary["domains"])]
                for name, arm in arms.items()
            ],
        ),
    ]


# --- writing ------------------------------------------------------------------------------------------------


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown; pictures are links to files beside it."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Picture):
            parts.append(f"![{block.alt}]({block.file})")
        else:
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one file in the style of the report, pictures included."""
    style = resources.files("versatune_ds.observability").joinpath("templates/report.css").read_text("utf-8")
    parts = [f"<header><h1>{html.escape(title)}</h1></header>", "<main>"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{html.escape(block.text)}</h2>")
        elif isinstance(block, Text):
            parts.append(f"<p>{html.escape(block.text)}</p>")
        elif isinstance(block, Picture):
            data = base64.b64encode(block.png).decode("ascii")
            parts.append(
                f'<p><img alt="{html.escape(block.alt)}" style="max-width:100%;background:#fff" '
                f'src="data:image/png;base64,{data}"></p>'
            )
        else:
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in block.head)
            body = "".join(
                f'<tr><th scope="row">{html.escape(row[0])}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
                + "</tr>"
                for row in block.rows
            )
            parts.append(
                f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
    body = "\n".join([*parts, "</main>"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def _seeds(summary: Mapping[str, Any]) -> list[int]:
    seeds: list[int] = summary["arms"][summary["baselines"][0]]["seeds"]
    return seeds


def _shares(mixture: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:g} %" for name, share in mixture.items())


def _first_last(weights: Mapping[str, Any], domain: str) -> str:
    return f"{100 * weights['initial'][domain]:.1f}, {100 * weights['final'][domain]:.1f}"


def _group(name: str) -> int:
    """Colour of a bar: fixed mixtures, and those that move."""
    return 0 if name in ("uniform", "inverse", "constant") else 1


def _percent(value: Mapping[str, float | None], digits: int) -> str:
    """`-1.23 ± 0.45 %` with a sign."""
    mean = value["mean"]
    assert mean is not None
    return f"{_signed(100 * mean, digits)}{_plus_minus(value, digits)} %"


def _against(arm: Mapping[str, Any], name: str, baseline: str) -> str:
    """Mean change against a baseline; a dash for the baseline itself."""
    return NOTHING if name == baseline else _points(arm["against"][baseline]["mean_change"])


def _points(value: Mapping[str, float | None]) -> str:
    """A difference of two changes in percentage points, with a sign."""
    assert value["mean"] is not None
    return f"{_signed(100 * value['mean'], 2)}{_plus_minus(value, 2)}"


def _plus_minus(value: Mapping[str, float | None], digits: int) -> str:
    half_width = value["half_width"]
    return "" if half_width is None else f" ± {100 * half_width:.{digits}f}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)
