"""Read run folders back, also of running, killed and foreign runs, into arrays that can be drawn.

Nothing that a run may lack is an error: missing files, missing keys and null become NaN or empty. What was
found damaged (a torn last line, an unreadable line) is kept as a note that the report shows. Only a folder
that holds no run at all, or a metrics file without a single readable line, is refused.

Legend: n recorded steps, k domains, u weight updates, e evaluations.

What is not covered: drawing (`figures`), wording and layout (`report`), checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from versatune_ds.domain.evaluation import ModelEvaluation
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import DataError, StateError
from versatune_ds.foundations.json_input import finite

Array = npt.NDArray[np.float64]
SHARE_UNITS = ("samples", "tokens", "supervised_tokens")
GROWING = (constants.METRICS_FILE, constants.WEIGHTS_FILE, constants.EVAL_FILE)
RUN_FILES = (constants.RUN_INFO_FILE, constants.RESOLVED_CONFIG_FILE, *GROWING)
STEP_KEYS = (
    *("loss", "lr", "grad_norm", "real_tokens", "slot_tokens", "supervised_tokens", "samples"),
    *("real_tokens_per_s", "slot_tokens_per_s", "supervised_tokens_per_s", "mfu", "mfu_6n", "step_s"),
    *("data_wait_s", "plan_s", "boundary_s", "update_s", "probe_s", "save_stall_s", "memory_gib"),
    "unix_time_s",
)
STEP_DOMAIN_KEYS = (
    "domain_loss",
    "domain_supervised_tokens",
    "weights",
    "target_shares",
    "epochs",
    "domain_base_kl",
)
UPDATE_KEYS = ("gamma", "phi", "after")
MAX_NOTES_PER_FILE = 5


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something a person should look at."""

    step: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """One run folder as arrays. NaN stands for what was not recorded."""

    folder: Path
    label: str
    """Short name, different for every run of a report."""
    info: Mapping[str, Any]
    """run.json."""
    config: Mapping[str, Any]
    """resolved.yaml as plain values."""
    config_text: str
    """resolved.yaml as it is."""
    names: tuple[str, ...]
    """The k domains."""
    weight_unit: str
    """What a weight is a share of; one of SHARE_UNITS."""
    steps: Array
    """[n] optimizer steps done."""
    series: Mapping[str, Array]
    """Key of STEP_KEYS -> [n]."""
    domain_series: Mapping[str, Array]
    """Key of STEP_DOMAIN_KEYS -> [n, k]."""
    shares: Mapping[str, Array]
    """Unit -> [n, k] achieved share of each step's batch."""
    skipped: npt.NDArray[np.bool_]
    """[n] True where the step was skipped."""
    weight_steps: Array
    """[m] steps from which on `weights` hold: those of metrics.jsonl, or without them of the updates."""
    weights: Array
    """[m, k] weights that were in force."""
    update_steps: Array
    """[u] optimizer steps done at each weight update; step 0 (the initial weights) is left out."""
    updates: Mapping[str, Array]
    """Key of UPDATE_KEYS -> [u, k]; `rise` and `held_rise`: see `_guard`."""
    applied: npt.NDArray[np.bool_]
    """[u] False for a shadow update."""
    eval_steps: Array
    """[e] optimizer steps done at each evaluation."""
    eval_loss: Array
    """[e] over all domains."""
    eval_domain_loss: Array
    """[e, k]."""
    eval_s: Array
    """[e] seconds."""
    eval_score: Array
    """[e, k] mean score of answers, 0 to 1."""
    best: Mapping[str, Any]
    """checkpoints/best.json, empty where no checkpoint is kept for its loss."""
    evaluation: ModelEvaluation | None
    """evaluation.json of `versatune-ds evaluate`, if there is one."""
    alarms: tuple[Alarm, ...]
    notes: tuple[str, ...]
    """What was found damaged or missing, in words."""
    x_label: str = "optimizer step"
    """What all `..steps` count (`measures.by_tokens`)."""

    def column(self, name: str) -> int | None:
        """Index of a domain, or None if the run does not have it."""
        return self.names.index(name) if name in self.names else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read run folders; labels are made different.

    Raises:
        StateError: a folder is missing, holds no run, is given twice, or has no readable metrics line.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise StateError(f"run folder {folder} is given twice")
    labels = distinct_labels(resolved)
    return [read_run(path, label) for path, label in zip(resolved, labels, strict=True)]


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths (folder name, with parents where needed) that differ from each other."""
    depth = 1
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels) or depth > max(len(folder.parts) for folder in folders):
            return labels
        depth += 1


def read_run(folder: Path, label: str | None = None) -> RunData:
    """Read one run folder; see `read_runs`."""
    folder = Path(folder)
    _require_run(folder)
    notes: list[str] = []
    facts = "versions and hardware are unknown"
    _, info = _read_mapping(folder / constants.RUN_INFO_FILE, json.loads, facts, notes)
    if isinstance(info.get("note"), str):
        notes.append(info["note"])
    settings_file = folder / constants.RESOLVED_CONFIG_FILE
    config_text, config = _read_mapping(settings_file, yaml.safe_load, "settings are unknown", notes)
    metrics_file = folder / constants.METRICS_FILE
    best = folder / constants.CHECKPOINTS_DIR / constants.BEST_FILE
    first_line = next(read_jsonl(metrics_file, []), {})
    evals = list(read_jsonl(folder / constants.EVAL_FILE, notes))
    updates = list(read_jsonl(folder / constants.WEIGHTS_FILE, notes))
    names = _domain_names(info, config, [first_line, *evals[:1], *updates[:1]])
    steps, skip_reasons = _read_steps(metrics_file, names, notes)
    real_updates = [line for line in updates if line["step"] > 0]
    weight_steps, weights = steps["steps"], steps["domain_series"]["weights"]
    if not np.isfinite(weights).any():
        weight_steps, weights = _weights_in_force(updates, names)
    return RunData(
        folder=folder,
        label=label or folder.resolve().name,
        info=info,
        config=config,
        config_text=config_text,
        names=names,
        weight_unit=_weight_unit(config, first_line),
        **steps,
        weight_steps=weight_steps,
        weights=weights,
        update_steps=_column(real_updates, "step"),
        updates={key: _matrix(real_updates, key, names) for key in UPDATE_KEYS} | _guard(real_updates, names),
        applied=np.array([line.get("applied") is not False for line in real_updates], dtype=bool),
        eval_steps=_column(evals, "step"),
        eval_loss=_column(evals, "loss"),
        eval_domain_loss=_matrix(evals, "domain_loss", names),
        eval_s=_column(evals, "eval_s"),
        eval_score=_matrix(evals, "domain_score", names),
        best=_read_mapping(best, json.loads, "the best one is unknown", notes)[1] if best.is_file() else {},
        evaluation=_read_evaluation(folder / constants.EVALUATION_FILE, notes),
        alarms=_alarms(skip_reasons, updates),
        notes=tuple(notes),
    )


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise StateError(f"run folder {folder} {kind}; give a folder that `train` wrote (`run.dir`)")
    if any((folder / name).is_file() for name in RUN_FILES):
        return
    inside = sorted(path.name for path in folder.iterdir() if (path / RUN_FILES[2]).is_file())
    hint = f"; runs inside it: {', '.join(inside[:10])}" if inside else ""
    raise StateError(
        f"{folder} is not a run folder: it has none of {', '.join(RUN_FILES)}{hint}. "
        "Give a folder that `train` wrote (`run.dir`)"
    )


def _read_mapping(
    path: Path, parse: Callable[[str], Any], unknown: str, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """Text and mapping of a file; empty, with a note, where it is missing or damaged."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: {unknown}")
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        value = parse(text)
    except (ValueError, OSError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return "", {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no keys and values")
        return text, {}
    return text, value


def _read_evaluation(path: Path, notes: list[str]) -> ModelEvaluation | None:
    """The evaluation of the finished model; a damaged file becomes a note."""
    try:
        return ModelEvaluation.read(path) if path.is_file() else None
    except DataError as error:
        notes.append(str(error))
        return None


def read_jsonl(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; at its end, a torn last line and bad lines become notes."""
    if not path.is_file():
        return
    bad: list[int] = []
    good = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                value = json.loads(text)
            except ValueError:
                value = None
            if isinstance(value, dict) and math.isfinite(_number(value.get("step"))):
                good += 1
                yield value
            elif not text.endswith("\n"):
                notes.append(
                    f"{path.name}: the last line ({number}) is incomplete and was left out; the run is "
                    "writing it, or was killed while it did"
                )
            elif text.strip():
                bad.append(number)
    for number in bad[:MAX_NOTES_PER_FILE]:
        notes.append(f"{path.name}: line {number} is not a record and was left out")
    if len(bad) > MAX_NOTES_PER_FILE:
        notes.append(f"{path.name}: {len(bad)} lines in all are not records and were left out")
    if bad and not good:
        raise StateError(
            f"{path}: none of its {len(bad)} lines is a JSON object with a `step`; "
            "this is not a file that `train` wrote, or it is damaged"
        )


def _read_steps(path: Path, names: Sequence[str], notes: list[str]) -> tuple[dict[str, Any], dict[int, str]]:
    """The metrics lines in order of steps; of a step recorded twice the later line counts.

    A line is turned into numbers as it is read: a long run's file does not fit memory as dictionaries.

    Returns:
        Fields of `RunData`; and the reason of each skipped step, empty where a run did not record it.
    """
    rows: dict[int, Array] = {}
    reasons: dict[int, str] = {}
    twice = 0
    for line in read_jsonl(path, notes):
        step = int(line["step"])
        twice += step in rows
        rows[step] = _step_row(line, names)
        reasons[step] = str(line.get("skip_reason") or "")
    if twice:
        notes.append(f"{path.name}: {twice} steps are recorded more than once; the last line of each counts")
    order = sorted(rows)
    k = len(names)
    width = len(STEP_KEYS) + (len(STEP_DOMAIN_KEYS) + len(SHARE_UNITS)) * k + 1
    table = np.array([rows[step] for step in order], dtype=np.float64).reshape(len(order), width)
    numbers, rest = table[:, : len(STEP_KEYS)], table[:, len(STEP_KEYS) : -1]
    blocks = [rest[:, i * k : (i + 1) * k] for i in range(len(STEP_DOMAIN_KEYS) + len(SHARE_UNITS))]
    found = {
        "steps": np.array(order, dtype=np.float64),
        "series": {key: numbers[:, i] for i, key in enumerate(STEP_KEYS)},
        "domain_series": dict(zip(STEP_DOMAIN_KEYS, blocks, strict=False)),
        "shares": dict(zip(SHARE_UNITS, blocks[len(STEP_DOMAIN_KEYS) :], strict=True)),
        "skipped": table[:, -1] == 1.0,
    }
    return found, {step: reasons[step] for step in order if rows[step][-1] == 1.0}


def _step_row(line: Mapping[str, Any], names: Sequence[str]) -> Array:
    """Numbers of STEP_KEYS, then k for each of STEP_DOMAIN_KEYS and SHARE_UNITS, then 1 if skipped."""
    row = [_number(line.get(key)) for key in STEP_KEYS]
    for key in STEP_DOMAIN_KEYS:
        row += _row(line.get(key), names)
    achieved = line.get("achieved_shares")
    for unit in SHARE_UNITS:
        row += _row(achieved.get(unit) if isinstance(achieved, dict) else None, names)
    row.append(float(line.get("skipped") is True))
    return np.array(row, dtype=np.float64)


def _weights_in_force(updates: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Array, Array]:
    """Steps [m] and weights [m, k] from weights.jsonl; the last ones are shown for one more interval."""
    weights = [line.get("before" if line.get("applied") is False else "after") for line in updates]
    steps = [int(line["step"]) for line in updates]
    if len(steps) > 1:
        steps, weights = [*steps, 2 * steps[-1] - steps[-2]], [*weights, weights[-1]]
    return np.array(steps, dtype=np.float64), _rows(weights, names)


def _domain_names(
    info: Mapping[str, Any], config: Mapping[str, Any], recorded: Iterable[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Domains in table order as run.json or the configuration says, then any others that have records."""
    names: dict[str, None] = {}
    for listed in (info.get("domains"), _mapping(config.get("domains")).get("names")):
        if isinstance(listed, list | dict):
            names.update(dict.fromkeys(str(name) for name in listed))
    for line in recorded:
        for key in ("weights", "domain_loss", "after"):
            names.update(dict.fromkeys(_mapping(line.get(key))))
    return tuple(names)


def _weight_unit(config: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    found = [line.get("weight_unit"), _mapping(config.get("domains")).get("weight_unit")]
    return next((unit for unit in found if unit in SHARE_UNITS), SHARE_UNITS[0])


def _number(value: Any) -> float:
    """A float; NaN for null, text and everything else that is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    number = finite(value) if is_number else None
    return math.nan if number is None else number


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> Array:
    return np.array([_number(line.get(key)) for line in lines], dtype=np.float64)


def _matrix(lines: Sequence[Mapping[str, Any]], key: str, names: Sequence[str]) -> Array:
    return _rows([line.get(key) for line in lines], names)


def _guard(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Array]:
    """What the guard saw: how far each held-out loss was above its lowest one, of all and of held domains."""
    entries = [[_mapping(_mapping(line.get("guard")).get(name)) for name in names] for line in lines]
    rise = _rows([[entry.get("rise") for entry in row] for row in entries], names)
    held = np.array([[entry.get("held") is True for entry in row] for row in entries], dtype=bool)
    return {"rise": rise, "held_rise": np.where(held.reshape(rise.shape), rise, np.nan)}


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; an empty one for everything else."""
    return value if isinstance(value, dict) else {}


def _rows(values: Sequence[Any], names: Sequence[str]) -> Array:
    rows = [_row(value, names) for value in values]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def _row(value: Any, names: Sequence[str]) -> list[float]:
    """Values by domain, from a mapping by name or a list in table order; NaN where there is none."""
    if isinstance(value, list) and len(value) == len(names):
        value = dict(zip(names, value, strict=True))
    by_name = _mapping(value)
    return [_number(by_name.get(name)) for name in names]


def _alarms(skip_reasons: Mapping[int, str], updates: Sequence[Mapping[str, Any]]) -> tuple[Alarm, ...]:
    unchanged = "no rank changed its parameters"
    found = [
        Alarm(step, "skipped", f"{reason}: {unchanged}" if reason else unchanged)
        for step, reason in skip_reasons.items()
    ]
    for line in updates:
        for kind, key in (("alarm", "alarms"), ("note", "reasons")):
            found += [Alarm(int(line["step"]), kind, text) for text in _texts(line.get(key))]
    return tuple(sorted(found, key=lambda alarm: alarm.step))


def _texts(value: Any) -> list[str]:
    """Texts of a list of texts, of a mapping name -> text(s), or of one text."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        return [f"{name}: {text}" for name, inner in value.items() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [] if value is None else [str(value)]


def smooth(values: Array, window: int, weights: Array | None = None) -> Array:
    """[n] mean over the last `window` entries, weighted; NaN entries are left out, NaN where all are.

    With supervised tokens as weights this is the loss of all tokens of the window: sums are added and
    divided once, so a step with few tokens counts little.
    """
    scale = np.ones_like(values) if weights is None else np.nan_to_num(weights)
    valid = np.isfinite(values) & (scale > 0)
    total = np.cumsum(np.where(valid, values * scale, 0.0))
    amount = np.cumsum(np.where(valid, scale, 0.0))
    total[window:] = total[window:] - total[:-window].copy()
    amount[window:] = amount[window:] - amount[:-window].copy()
    out = np.full(len(values), np.nan)
    np.divide(total, amount, out=out, where=amount > 0.5 * np.min(scale[valid], initial=1.0))
    return out
