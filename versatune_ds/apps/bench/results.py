"""What a trainer benchmark's times amount to: rates, shares, the step of the full model, tables.

A slice is a model cut to its first L layers with embedding and head of true size. The step of the
full model is never called measured when it was not; it is computed in one of two ways and marked
`extrapolated`:

    two slices or more   step_s = a + b L through the shortest and the longest slice
    one slice            forward and backward grow with the layers, the optimizer with the parameters, and
                         the rest (loss, data wait, statistics) stays

Slices that could not be measured stay in the result, with the reason.

What is not covered: measuring (`versatune_ds.apps.bench.trainer`), and the memory and communication of
the full model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations.errors import DataError
from versatune_ds.observability.throughput import TERA, mfu
from versatune_ds.report.measures import number, percent
from versatune_ds.report.page import Page, PageSection, Table, to_markdown

SCHEMA_VERSION = 2
KIND = "trainer_bench"
PHASES = (*("data_wait", "forward", "loss", "backward", "optimizer", "statistics", "rank_wait", "other"),)
PER_LAYER_PHASES = ("forward", "backward")
UNITS = ("real", "slot", "supervised")
MEASURED = "measured"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean and 95th percentile."""
    found = (np.median(values), np.mean(values), np.quantile(values, 0.95))
    return dict(zip(("median", "mean", "p95"), map(float, found), strict=True))


class Work(NamedTuple):
    """FLOPs over all ranks, in both conventions of `engine/model/shape.py`."""

    flops: float
    """Useful work."""
    flops_6n: float
    """6 N + 12 L H T for every slot token."""


def work(shape: ModelShape, tokens: Mapping[str, float], pack_len: int) -> Work:
    """FLOPs of steps with these tokens (real, slot, supervised, sum_squared_lengths)."""
    useful = shape.step_flops(
        real_tokens=tokens["real"],
        supervised_tokens=tokens["supervised"],
        sum_squared_lengths=tokens["sum_squared_lengths"],
    )
    return Work(useful, shape.step_flops_6n(slot_tokens=tokens["slot"], pack_len=pack_len))


def rates(
    tokens: Mapping[str, float],
    done: Work,
    seconds: float,
    world_size: int,
    *,
    peak_tflops: float | None,
    ceiling_tflops: float | None,
) -> dict[str, Any]:
    """Tokens per second and rank, FLOP/s, MFU and ratio to the measured ceiling.

    Args:
        tokens: real, slot and supervised tokens over all ranks in `seconds`.
        done: work over all ranks in `seconds`.
        peak_tflops: datasheet peak of one accelerator, or None.
        ceiling_tflops: measured matrix product of one rank, or None.
    """
    achieved = done.flops / (seconds * world_size * TERA)
    return {
        **{f"{unit}_tokens_per_s_per_rank": tokens[unit] / (seconds * world_size) for unit in UNITS},
        "achieved_tflops_per_rank": achieved,
        "mfu": mfu(done.flops, seconds, world_size, peak_tflops),
        "mfu_6n": mfu(done.flops_6n, seconds, world_size, peak_tflops),
        "ratio_to_matmul_ceiling": None if not ceiling_tflops else achieved / ceiling_tflops,
    }


def shares(split: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase as shares of their sum."""
    total = sum(split.values())
    return {name: seconds / total if total > 0 else 0.0 for name, seconds in split.items()}


def extrapolated_step_s(
    slices: Sequence[Mapping[str, Any]], full_layers: int, parameter_ratio: float
) -> tuple[float, str]:
    """Seconds of a step of the full model, and how they were found.

    Args:
        slices: `layers`, `step_s` (with `mean`) and `split_s` of each measured slice.
        parameter_ratio: parameters of the full model over those of the single slice.
    """
    ordered = sorted(slices, key=lambda measured: measured["layers"])
    short, long = ordered[0], ordered[-1]
    if long["layers"] == full_layers:
        return long["step_s"]["mean"], "measured"
    if short["layers"] != long["layers"]:
        step_s, layers = (tuple(measured[key] for measured in (short, long)) for key in ("step_s", "layers"))
        per_layer = (step_s[1]["mean"] - step_s[0]["mean"]) / (layers[1] - layers[0])
        whole = step_s[1]["mean"] + per_layer * (full_layers - layers[1])
        return whole, f"line through the steps of {layers[0]} and {layers[1]} layers"
    part = shares(long["split_s"])
    growing = sum(part[name] for name in PER_LAYER_PHASES) * full_layers / long["layers"]
    optimizer = part["optimizer"] * parameter_ratio
    fixed = sum(part[name] for name in PHASES if name not in (*PER_LAYER_PHASES, "optimizer"))
    scale = growing + optimizer + fixed
    return (
        long["step_s"]["mean"] * scale,
        f"forward and backward of {long['layers']} layers scaled to {full_layers}, optimizer by parameters",
    )


def full_model(
    slices: Sequence[Mapping[str, Any]], full: ModelShape, pack_len: int, world_size: int, **bounds: Any
) -> dict[str, Any]:
    """The step of the full model: measured when a slice was all of it, else extrapolated and marked.

    Args:
        bounds: `peak_tflops` and `ceiling_tflops` of `rates`.
    """
    longest = max(slices, key=lambda measured: measured["layers"])
    ratio = full.parameters / longest["num_parameters"]
    step_s, method = extrapolated_step_s(slices, full.layers, ratio)
    tokens = longest["tokens_per_step"]
    about = {"layers": full.layers, "extrapolated": method != "measured", "method": method, "step_s": step_s}
    return about | rates(tokens, work(full, tokens, pack_len), step_s, world_size, **bounds)


def result_of(
    outcomes: Sequence[Mapping[str, Any]], known: Mapping[str, Any], full: ModelShape, *, is_finished: bool
) -> dict[str, Any]:
    """The result of a benchmark so far, as it is written.

    Args:
        outcomes: of slices (`apps/bench/slices.py`), fewest layers first, those that failed too.
        known: `command`, `settings` and `environment` as far as they are known before anything is measured.
    """
    measured = [outcome for outcome in outcomes if outcome["slice"]["status"] == MEASURED]
    newest: Mapping[str, Any] = measured[-1] if measured else {}
    environment = {**known["environment"], **newest.get("environment", {})}
    settings = {**known["settings"], **newest.get("settings", {})}
    peak = newest.get("peak_tflops")
    ceiling, whole = newest["slice"]["matmul_ceiling"] if measured else None, None
    if ceiling:
        bounds = {"peak_tflops": peak, "ceiling_tflops": ceiling["tflops"]}
        slices = [outcome["slice"] for outcome in measured]
        whole = full_model(slices, full, settings["pack_len"], environment["world_size"], **bounds)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "command": known["command"],
        "finished": is_finished,
        "environment": environment,
        "settings": settings,
        "peak_tflops": peak,
        "matmul_ceiling": ceiling,
        "slices": [outcome["slice"] for outcome in outcomes],
        "full_model": whole,
    }


def measured_slices(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The slices of a result that have numbers."""
    return [part for part in result["slices"] if part["status"] == MEASURED]


def lost_texts(result: Mapping[str, Any]) -> list[str]:
    """One line for each slice without numbers."""
    return [
        f"{part['layers']} layers: {part['status']}: {part['reason']}"
        for part in result["slices"]
        if part["status"] != MEASURED
    ]


def table(result: Mapping[str, Any]) -> str:
    """One benchmark as Markdown."""
    settings, environment = result["settings"], result["environment"]
    slices = measured_slices(result)
    where = f"{environment.get('device', 'nothing measured')} x {environment['world_size']}"
    title = f"Trainer benchmark: {settings['shape']}, {where}, {environment['date']}"
    lead = [] if result["finished"] else ["Not finished: slices are still to come."]
    lead += _list("Not measured:", lost_texts(result))
    if not slices:
        return to_markdown(Page(title, [], "\n\n".join(lead)))
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lead += [
        f"Commit {environment['commit']}; {versions}. {_setting_text(settings)}.",
        f"Matrix products of one rank: {number(result['matmul_ceiling']['tflops'])} TFLOP/s measured in this "
        f"run; datasheet peak: {number(result['peak_tflops'], 0)}.",
    ]
    rows = [(str(measured["layers"]), _rate_cells(measured)) for measured in slices]
    full, notes = result["full_model"], []
    if full["extrapolated"]:
        rows.append((f"{full['layers']} (extrapolated)", _rate_cells(full)))
        notes.append(f"Extrapolated: {full['method']}. Not measured.")
    split = []
    for measured in slices:
        seconds, of_step = measured["split_s"], shares(measured["split_s"])
        cells = [f"{1e3 * seconds[name]:.3g} ({percent(of_step[name], 2)})" for name in PHASES]
        split.append((str(measured["layers"]), cells))
    after = [_update_text(measured) for measured in slices]
    after += [_comparison_text(m) for m in slices if m["statistics_off"] is not None]
    rated, parted = Table(["layers", *RATE_COLUMNS], rows), Table(["layers", *PHASES], split)
    how = "Step split, measured in separate steps (ms and share of the step):"
    sections = [
        PageSection("rates", "", tables=[rated], notes=[*notes, CONVENTIONS]),
        PageSection("split", "", how, tables=[parted], notes=["\n".join(after)]),
    ]
    return to_markdown(Page(title, sections, "\n\n".join(lead)))


def _list(title: str, texts: Sequence[str]) -> list[str]:
    return [title, "\n".join(f"- {text}" for text in texts)] if texts else []


RATE_COLUMNS = (
    *("step s (median)", "p95", "real tokens/s/rank", "slot", "supervised", "TFLOP/s/rank"),
    *("MFU", "MFU 6N", "of ceiling", "peak GiB", "planned GiB"),
)
CONVENTIONS = (
    "MFU: useful FLOPs of real tokens, causal attention within samples. MFU 6N: 6 N + 12 L H T for every "
    "slot token, N all parameters, T the pack, as most papers count; compare theirs with this one."
)


def _rate_cells(measured: Mapping[str, Any]) -> list[str]:
    """Cells of a slice, or of the full model, which has one step time and no memory."""
    step_s = measured["step_s"]
    if not isinstance(step_s, Mapping):
        step_s = {"median": step_s, "p95": None}
    return [
        number(step_s["median"]),
        number(step_s["p95"]),
        *(number(measured[f"{unit}_tokens_per_s_per_rank"], 0) for unit in UNITS),
        number(measured["achieved_tflops_per_rank"]),
        percent(measured["mfu"]),
        percent(measured["mfu_6n"]),
        percent(measured["ratio_to_matmul_ceiling"]),
        number(measured.get("peak_memory_gib"), 2),
        number(measured.get("plan", {}).get("peak_gib"), 2),
    ]


def _update_text(measured: Mapping[str, Any]) -> str:
    update = measured["weight_update"]
    return (
        f"{measured['layers']} layers: a weight update takes {1e3 * update['update_s']:.3g} ms, "
        f"{percent(update['share_of_steps'], 4)} of the {update['every_n_steps']} steps between two; "
        f"the batch after it is waited for {1e3 * update['data_wait_after_s']:.3g} ms."
    )


def _comparison_text(measured: Mapping[str, Any]) -> str:
    off = measured["statistics_off"]
    return (
        f"{measured['layers']} layers: with domain statistics {number(off['step_s_with']['median'], 4)} s, "
        f"without {number(off['step_s_without']['median'], 4)} s (medians of alternating steps), ratio "
        f"{number(off['ratio'], 4)}."
    )


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All trainer benchmarks in a folder, by file name.

    Raises:
        DataError: a file is not JSON or of another version, or there is none.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", path=path, line=error.lineno) from None
        if not isinstance(value, dict) or value.get("kind") != KIND:
            continue
        if value.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"schema_version {value.get('schema_version')}; this program reads {SCHEMA_VERSION}: "
                "measure again",
                path=path,
            )
        found.append({**value, "name": path.stem})
    if not found:
        raise DataError(
            f"{folder} holds no result of a trainer benchmark; the verb bench writes them (--out)"
        )
    return found


def page(results: Sequence[Mapping[str, Any]], failures: Sequence[str] = ()) -> str:
    """Several benchmarks on one Markdown page; `failures`: settings that ended with an error, a line each."""
    failed = [f"{result['name']}: {text}" for result in results for text in lost_texts(result)]
    rows, settings = [], []
    for result in results:
        environment, full = result["environment"], result["full_model"]
        if full is None:
            continue
        settings.append(f"{result['name']}: {_setting_text(result['settings'])}")
        longest = max(measured_slices(result), key=lambda measured: measured["layers"])
        memory = {key: longest[key] for key in ("peak_memory_gib", "plan")}
        shown = {**full, **memory} if full["extrapolated"] else longest
        layers = f"{full['layers']} * from {longest['layers']}" if full["extrapolated"] else full["layers"]
        cells = [environment["device"], environment["world_size"], layers, *_rate_cells(shown)]
        cells += [percent(shares(longest["split_s"])["statistics"], 3), environment["commit"]]
        rows.append((result["name"], [*map(str, cells), environment["date"]]))
    lead = (
        "Rows with `*` are extrapolated from a slice of the model's layers and not measured; their memory is "
        "that of the slice."
    )
    head = ["benchmark", "device", "ranks", "layers", *RATE_COLUMNS, "statistics", "commit", "date"]
    notes = [*_list("Settings:", settings), *_list("Not measured:", [*failed, *failures])]
    section = PageSection("comparison", "", CONVENTIONS, tables=[Table(head, rows)], notes=notes)
    return to_markdown(Page("Trainer benchmarks", [section], lead))


def _setting_text(settings: Mapping[str, Any]) -> str:
    return (
        f"{settings['packs_per_rank']} pack(s) of {settings['pack_len']} tokens a rank and step, "
        f"{settings['dtype']}, ZeRO-{settings['zero_stage']}, activation checkpointing "
        f"{settings['activation_checkpointing']}, attention {settings['attention']}, "
        f"loss {settings['loss_backend']}, data {settings['data']}"
    )
