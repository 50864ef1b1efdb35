"""From raw times to the file, the table and the ratios. Pure functions; no torch.

Of a case's variants, `three products` is the ceiling and `hf eager` the baseline. A ratio compares
medians: of device seconds on a GPU, of CPU seconds on a CPU (where the machine may be shared; wall
ratios stand beside them).

    transient   peak above the inputs, minus the two gradients that the caller asked for
    TFLOP/s     6 H V n / time, n the rows that have a label: the three products that are needed (of a frozen
                head two: 4 H V n)

What is not covered: the picture (`picture`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loss_bench.card import NOT_KNOWN, read_card

SCHEMA_VERSION = 2
GIB = 2**30
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "numpy")
CEILING, BASELINE = "three products", "hf eager"


# ---- numbers -----------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values; `share` in 0..1."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    return {
        "median": statistics.median(values),
        "p20": quantile(values, 0.2),
        "p80": quantile(values, 0.8),
    }


def summarise(case: dict[str, Any], entries: list[dict[str, Any]], device_type: str) -> dict[str, Any]:
    """A case with the numbers of all its variants.

    Args:
        case: `Case.to_json()`.
        entries: from `driver.measure_case`.
        device_type: "cpu" or "cuda"; decides which clock the ratios compare.
    """
    clock = "wall_s" if device_type == "cuda" else "cpu_s"
    variants = [_one(entry, case["useful_flops"], clock) for entry in entries]
    ceiling = _median_of(variants, CEILING, clock)
    eager = next((v for v in variants if v["candidate"] == BASELINE and v["status"] == "ok"), None)
    for variant in variants:
        if variant["status"] != "ok" or "wall_s" not in variant:
            continue
        own = variant[clock]["median"]
        variant["ratio_to_ceiling"] = _ratio(own, ceiling)
        if eager is not None:
            variant["ratio_to_eager"] = {
                "time": _ratio(own, eager[clock]["median"]),
                "wall": _ratio(variant["wall_s"]["median"], eager["wall_s"]["median"]),
                "transient": _ratio(variant["transient_gib"], eager["transient_gib"]),
                "peak": _ratio(variant["peak_gib"], eager["peak_gib"]),
            }
    return {"case": case, "clock": clock, "variants": variants}


def _one(entry: dict[str, Any], useful_flops: float, clock: str) -> dict[str, Any]:
    """The numbers of one variant by itself."""
    kept = ("candidate", "variant", "status", "reason", "gate", "chunk", "chunks_tried_s")
    out = {key: entry[key] for key in kept if key in entry}
    if entry["status"] != "ok" or not entry.get("s"):
        return out
    out["wall_s"], out["cpu_s"] = spread(entry["s"]), spread(entry["cpu_s"])
    if "host_s" in entry:
        out["host_s"] = spread(entry["host_s"])
    out["num_runs"] = len(entry["s"])
    useful_flops *= 1 if entry["dw_bytes"] else 2 / 3
    out["useful_tflops"] = useful_flops / out[clock]["median"] / 1e12
    out["dx_gib"], out["dw_gib"] = entry["dx_bytes"] / GIB, entry["dw_bytes"] / GIB
    peaks = [peak for peak in entry["peak_bytes"] if peak is not None]
    out["peak_gib"] = statistics.median(peaks) / GIB if peaks else None
    out["transient_gib"] = None
    if out["peak_gib"] is not None:
        out["transient_gib"] = max(0.0, out["peak_gib"] - out["dx_gib"] - out["dw_gib"])
    return out


def _median_of(variants: list[dict[str, Any]], candidate: str, clock: str) -> float | None:
    for variant in variants:
        if variant["candidate"] == candidate and clock in variant:
            return float(variant[clock]["median"])
    return None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def too_slow(
    cases: Sequence[dict[str, Any]], case: dict[str, Any], limit_s: float
) -> dict[tuple[str, str], str]:
    """Variants that took longer than `limit_s` a run in an earlier case of this dtype that was no larger, or
    that the time limit ended there.

    Args:
        cases: summaries so far.
        case: `Case.to_json()` of the next one.
        limit_s: wall seconds.

    Returns:
        (candidate, variant) -> reason.
    """
    found = {}
    size = ("hidden_size", "vocab_size", "num_tokens")
    for earlier in cases:
        about = earlier["case"]
        if about["dtype"] != case["dtype"] or any(about[key] > case[key] for key in size):
            continue
        for variant in earlier["variants"]:
            seconds = variant["wall_s"]["median"] if "wall_s" in variant else 0.0
            where = f"N {about['num_tokens']}, {about['supervised']:.0%}"
            if seconds > limit_s:
                found[variant["candidate"], variant["variant"]] = f"{seconds:.0f} s a run at {where}"
            elif variant.get("status") == "cut":
                found[variant["candidate"], variant["variant"]] = f"cut by the time limit at {where}"
    return found


# ---- where it ran ------------------------------------------------------------------------------


def describe_environment(device_type: str) -> dict[str, Any]:
    """Date, hardware, versions, commit and load: what a reader needs to trust or repeat the numbers."""
    import torch

    info: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device_type": device_type,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": git_commit(Path(__file__).parent),
        "sources": digest_of_sources(),
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = properties.name
        info["gpu_memory_gib"] = properties.total_memory / GIB
        info["gpu_multiprocessors"] = properties.multi_processor_count
        info["cuda"] = torch.version.cuda
        info["card"] = read_first_card()
    return info


def read_first_card() -> dict[str, str]:
    """The state of torch's first CUDA device, which is the one that is measured."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    card = read_card(str(properties.uuid))
    for key, attribute in (("sm_clock_max_mhz", "clock_rate"), ("memory_clock_max_mhz", "memory_clock_rate")):
        if card[key] == NOT_KNOWN and hasattr(properties, attribute):
            card[key] = f"{getattr(properties, attribute) / 1000:.0f}"  # of kHz
    return card


def digest_of_sources() -> str:
    """Of the kernels' and this benchmark's Python files: tells what ran where there is no git."""
    digest = hashlib.sha256()
    kernels = Path(__file__).resolve().parents[2]
    for path in sorted(
        [*(kernels / "versatune_kernels").rglob("*.py"), *(kernels / "benchmarks").rglob("*.py")]
    ):
        digest.update(f"{path.relative_to(kernels)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match.group(1).strip() if match else platform.machine()


def git_commit(folder: Path) -> str | None:
    """Commit of the source tree, "-dirty" appended when tracked files differ from it; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware_name(environment: dict[str, Any]) -> str:
    """For people: the GPU, or the CPU with its cores."""
    return str(environment.get("gpu") or f"{environment['cpu']}, {environment['cpu_count']} cores")


def slug(text: str) -> str:
    """Lower-case words joined by dashes, for folder names."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


# ---- the table ---------------------------------------------------------------------------------

COLUMNS = (
    "candidate", "variant", "chunk", "runs", "time ms (p20-p80)", "host ms", "TFLOP/s", "x ceiling",
    "x eager", "x eager (wall)", "transient GiB", "x eager (memory)", "dW + dX GiB", "loss err", "dX err",
    "dW err", "sums err", "gate",
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """All cases as Markdown."""
    environment = results["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    lines = [
        f"# Fused loss, {hardware_name(environment)}, {environment['date']}",
        "",
        f"Python {environment['python']}, {versions}; "
        f"{environment['threads']} thread(s). "
        f"Times are {'GPU' if environment['device_type'] == 'cuda' else 'CPU'} time, forward and backward, "
        f"median of the runs.",
    ]
    if "card" in environment:
        card = environment["card"]
        lines += [
            "",
            f"Driver {card['driver']}, CUDA {environment['cuda']}; power limit {card['power_limit_w']} W "
            f"(up to {card['power_limit_max_w']}); highest clocks {card['sm_clock_max_mhz']} MHz (SM), "
            f"{card['memory_clock_max_mhz']} MHz (memory).",
        ]
    if results["ended"] != "all measured":
        lines += ["", f"Not complete: {results['ended'] or 'still running, or killed'}."]
    if results["missing"]:
        missing = "; ".join(f"{name}: {why}" for name, why in results["missing"].items())
        lines += ["", f"Not measured: {missing}."]
    for case in results["cases"]:
        about = case["case"]
        lines += [
            "",
            f"## {about['head']}: H {about['hidden_size']}, V {about['vocab_size']}, "
            f"N {about['num_tokens']}, {about['supervised']:.0%} with a label, {about['dtype']}",
            "",
            f"Commit {case['commit']}, {case['measured_at']}, load average {_load_text(case)}."
            f"{_card_text(case)}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(_row(variant, case["clock"]) for variant in case["variants"]),
        ]
    return "\n".join(lines) + "\n"


def _load_text(case: dict[str, Any]) -> str:
    """Runnable processes of the machine over the last 1 and 15 minutes, when the case ended."""
    load = case["load_average"]
    return "not recorded" if load is None else f"{load[0]:.1f} (1 min), {load[2]:.1f} (15 min)"


def _card_text(case: dict[str, Any]) -> str:
    """Clocks in force, power and what slowed the card while the ceiling's products ran."""
    card = case.get("card_under_load")
    if not card:
        return ""
    return (
        f" Under load: {card['sm_clock_mhz']} MHz (SM), {card['memory_clock_mhz']} (memory), "
        f"{card['power_draw_w']} W, {card['temperature_c']} C, slowed by {card['slowed_by']}."
    )


def _row(variant: dict[str, Any], clock: str) -> str:
    """A line of the table; the reason instead of numbers where there are none."""
    gate = variant.get("gate") or {}
    errors = gate.get("errors") or {}
    cells = [variant["candidate"], variant["variant"], _text(variant.get("chunk"), "{}")]
    if clock in variant:
        times = {name: 1e3 * value for name, value in variant[clock].items()}
        eager = variant.get("ratio_to_eager") or {}
        cells += [
            str(variant["num_runs"]),
            f"{times['median']:.4g} ({times['p20']:.4g}-{times['p80']:.4g})",
            _text(1e3 * variant["host_s"]["median"] if "host_s" in variant else None, "{:.2g}"),
            _text(variant["useful_tflops"], "{:.4g}"),
            _text(variant.get("ratio_to_ceiling"), "{:.2f}"),
            _text(eager.get("time"), "{:.2f}"),
            _text(eager.get("wall"), "{:.2f}"),
            _text(variant["transient_gib"], "{:.3f}"),
            _text(eager.get("transient"), "{:.2f}"),
            _text(variant["dw_gib"] + variant["dx_gib"], "{:.3f}"),
        ]
    else:
        why = gate.get("verdict") if variant["status"] == "ok" else variant["status"]
        reason = (variant.get("reason") or "").replace("|", "/").replace("\n", " ")
        cells += ["", f"{why} {reason}".strip(), *[""] * 8]
    cells += [_text(errors.get(name), "{:.2g}") for name in ("loss", "dx", "dw", "sums")]
    cells.append(gate.get("verdict", "") if gate.get("verdict") != "none" else "")
    return f"| {' | '.join(cells)} |"


def _text(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
