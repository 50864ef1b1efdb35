"""`versatune-ds bench`: throughput of the trainer on a named model shape (many ranks: launch/bench.py).

Measures the trainer's own step on random weights: tokens/s, MFU, memory, where the time goes. Many ranks:
deepspeed launch/bench.py with the same options. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from versatune_ds.cli import place
from versatune_ds.foundations.constants import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from versatune_ds.apps.bench.settings import BenchSettings

DEFAULT_FOLDER = Path("runs/bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", help="qwen2.5-7b, -14b, -32b, qwen2-7b, llama-2-7b, -13b, llama-3-8b or tiny")
    add(
        "--layers",
        type=_layer_counts,
        default=(),
        metavar="N[,N]",
        help="slices of the first N layers with the true head; the full model's step is then extrapolated; "
        "default: the whole model, or slices of it where that does not fit",
    )
    add("--pack-len", type=int, default=8192, metavar="TOKENS")
    add("--packs-per-rank", type=int, default=8, metavar="N", help="packs of a rank in a step")
    add("--steps", type=int, default=20, metavar="N", help="steps on the clock")
    add("--warmup-steps", type=int, default=5, metavar="N")
    add("--split-steps", type=int, default=5, metavar="N", help="steps with every phase timed")
    add(
        "--metrics",
        choices=("on", "off", "both"),
        default="both",
        help="domain statistics; both adds steps with and without them in alternation",
    )
    add("--data", default="synthetic", metavar="CONFIG", help="prepared data of these settings")
    add("--supervised", type=float, default=0.5, metavar="SHARE", help="labels in synthetic data")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    add(
        "--checkpointing",
        dest="activation_checkpointing",
        type=lambda text: int(text) if text.isdigit() else text,
        default="auto",
        metavar="auto|off|all|selective|offload|N",
        help="recompute activations; auto: as little as fits by the memory model of `plan`",
    )
    add(
        "--zero",
        dest="zero_stage",
        type=int,
        choices=(0, 1, 2, 3),
        default=3,
        help="ZeRO stage, otherwise configs/deepspeed/zero3.json",
    )
    add("--deepspeed", metavar="FILE", help="another DeepSpeed JSON file, instead of --zero")
    add(
        "--slice-limit-s",
        type=float,
        metavar="SECONDS",
        help="end a slice that takes longer (building included), note it, and go on with the next",
    )
    add("--out", type=place, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s")
    add("--name", help="name of the result's files; default: made from the settings")
    add(
        "--page",
        type=place,
        metavar="FOLDER",
        help="measure nothing: compare the results in FOLDER on one page",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    add("overrides", nargs="*", metavar="section.key=value", help="any other setting of a run")


def run(args: argparse.Namespace) -> int:
    """Measure, and write JSON and table after every slice; or write the page."""
    if args.page is not None:
        write_page(args.page)
        return EXIT_OK
    if args.shape is None:
        from versatune_ds.foundations.errors import ConfigError

        raise ConfigError("bench: give --shape (or --page FOLDER to compare results); see --help")
    from versatune_ds.engine.faults.launcher import leave_with_launcher

    leave_with_launcher()
    from versatune_ds.apps.bench.fit import choose_slices, device_memory
    from versatune_ds.apps.bench.settings import BenchSettings, check_settings
    from versatune_ds.apps.bench.slices import run_slices
    from versatune_ds.config.load import validate_settings
    from versatune_ds.foundations import distributed
    from versatune_ds.foundations.files import require_own

    args.data = None if args.data == "synthetic" else args.data
    given = {name: getattr(args, name) for name in BenchSettings.model_fields}
    settings = validate_settings(BenchSettings, given, "bench")
    check_settings(settings)
    path = args.out / (args.name or _name(args, distributed.world_size()))
    signs = {f"{path.name}.json": '"schema_version"', f"{path.name}.md": "# Trainer benchmark"}
    require_own(path.parent, signs)
    slices = choose_slices(settings, device_memory())
    write = functools.partial(write_results, path, settings, len(slices))
    all_measured = run_slices(settings, slices, args.slice_limit_s, write)
    # the launcher ends rank 0 when another one leaves with an error: only rank 0 has the verdict
    return EXIT_OK if all_measured or not distributed.is_main() else EXIT_FAILURE


def write_results(
    path: Path, settings: BenchSettings, num_slices: int, outcomes: list[dict[str, Any]]
) -> None:
    """On rank 0: PATH.json and PATH.md of the slices that are through; at the end also to the console."""
    from versatune_ds.apps.bench.results import result_of, table
    from versatune_ds.apps.bench.shapes import find_shape
    from versatune_ds.foundations import distributed
    from versatune_ds.foundations.files import write_json_atomic, write_text_atomic

    if not distributed.is_main():
        return
    known = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {"date": time.strftime("%Y-%m-%d"), "world_size": distributed.world_size()},
        "settings": settings.model_dump(mode="json"),
    }
    is_finished = len(outcomes) == num_slices
    result = result_of(outcomes, known, find_shape(settings.shape), is_finished=is_finished)
    text = table(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path.with_name(f"{path.name}.json"), result)
    write_text_atomic(path.with_name(f"{path.name}.md"), text)
    if is_finished:
        print(text)
        print(f"written: {path}.json")


def write_page(folder: Path) -> None:
    """comparison.md of all results in a folder; settings that failed stand in its failures.txt."""
    from versatune_ds.apps.bench.results import page, read_results
    from versatune_ds.foundations.files import require_own, write_text_atomic

    require_own(folder, {"comparison.md": "# Trainer benchmarks"}, "give another --page")
    failures = folder / "failures.txt"
    failed = failures.read_text(encoding="utf-8").splitlines() if failures.is_file() else []
    text = page(read_results(folder), failed)
    write_text_atomic(folder / "comparison.md", text)
    print(text)
    print(f"written: {folder / 'comparison.md'}")


def _layer_counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _name(args: argparse.Namespace, world_size: int) -> str:
    """A file name that tells settings apart."""
    layers = "-".join(map(str, args.layers)) or "all"
    zero = Path(args.deepspeed).stem if args.deepspeed is not None else f"zero{args.zero_stage}"
    return (
        f"{args.shape}_{layers}-layers_{args.packs_per_rank}x{args.pack_len}_{args.dtype}_"
        f"recompute-{args.activation_checkpointing}_{zero}_{world_size}-ranks"
    )
