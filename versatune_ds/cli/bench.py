"""`versatune-ds bench`: throughput of the trainer on random weights of a named model shape."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from versatune_ds.foundations.constants import EXIT_OK

DEFAULT_FOLDER = Path("runs/bench")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="throughput of the trainer on a named model shape (many ranks: deepspeed launch/bench.py ...)",
        description=(
            "Measure the trainer's own step on random weights: tokens/s, MFU, memory, where the time goes. "
            "Many ranks: deepspeed launch/bench.py with the same options. See docs/benchmarks.md."
        ),
    )
    parser.add_argument(
        "--shape", help="qwen2.5-7b, -14b, -32b, qwen2-7b, llama-2-7b, -13b, llama-3-8b or tiny"
    )
    parser.add_argument(
        "--layers",
        type=_layer_counts,
        default=(),
        metavar="N[,N]",
        help="slices of the first N layers with the true head; the full model's step is then extrapolated",
    )
    parser.add_argument("--pack-len", type=int, default=8192, metavar="TOKENS")
    parser.add_argument(
        "--packs-per-rank", type=int, default=2, metavar="N", help="packs of a rank in a step"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps on the clock")
    parser.add_argument("--warmup-steps", type=int, default=5, metavar="N")
    parser.add_argument(
        "--split-steps", type=int, default=5, metavar="N", help="steps with every phase timed"
    )
    parser.add_argument(
        "--metrics",
        choices=("on", "off", "both"),
        default="both",
        help="domain statistics; both adds steps with and without them in alternation",
    )
    parser.add_argument(
        "--data", default="synthetic", metavar="CONFIG", help="prepared data of these settings"
    )
    parser.add_argument(
        "--supervised", type=float, default=0.5, metavar="SHARE", help="labels in synthetic data"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", default="off", metavar="off|all|N", help="recompute activations")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=3, help="ZeRO stage")
    parser.add_argument(
        "--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON file instead of --zero"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--name", help="name of the result's files; default: made from the settings")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FOLDER",
        help="measure nothing: compare the results in FOLDER on one page",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any other setting of a run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and write JSON and table, or write the page."""
    if args.page is not None:
        return write_page(args.page)
    if args.shape is None:
        from versatune_ds.foundations.errors import ConfigError

        raise ConfigError("bench: give --shape (or --page FOLDER to compare results); see --help")
    from versatune_ds.engine.faults.launcher import leave_with_launcher

    leave_with_launcher()
    from versatune_ds.apps.bench.results import table
    from versatune_ds.apps.bench.trainer import BenchSettings, bench, check_settings
    from versatune_ds.foundations import distributed
    from versatune_ds.foundations.files import write_json_atomic, write_text_atomic

    checkpointing = args.checkpointing
    settings = BenchSettings(
        shape=args.shape,
        layers=args.layers,
        pack_len=args.pack_len,
        packs_per_rank=args.packs_per_rank,
        warmup_steps=args.warmup_steps,
        steps=args.steps,
        split_steps=args.split_steps,
        metrics=args.metrics,
        data=None if args.data == "synthetic" else Path(args.data),
        supervised=args.supervised,
        dtype=args.dtype,
        activation_checkpointing=int(checkpointing) if checkpointing.isdigit() else checkpointing,
        zero_stage=args.zero,
        deepspeed=args.deepspeed,
        overrides=tuple(args.overrides),
    )
    check_settings(settings)
    result = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), **bench(settings)}
    if distributed.is_main():
        args.out.mkdir(parents=True, exist_ok=True)
        name = args.name or _name(args, result["environment"]["world_size"])
        write_json_atomic(args.out / f"{name}.json", result)
        write_text_atomic(args.out / f"{name}.md", table(result))
        print(table(result))
        print(f"written: {args.out / name}.json")
    return EXIT_OK


def write_page(folder: Path) -> int:
    """comparison.md of all results in a folder; settings that failed stand in its failures.txt."""
    from versatune_ds.apps.bench.results import page, read_results
    from versatune_ds.foundations.files import write_text_atomic

    failures = folder / "failures.txt"
    failed = failures.read_text(encoding="utf-8").splitlines() if failures.is_file() else []
    text = page(read_results(folder), failed)
    write_text_atomic(folder / "comparison.md", text)
    print(text)
    print(f"written: {folder / 'comparison.md'}")
    return EXIT_OK


def _layer_counts(text: str) -> tuple[int, ...]:
    """`4,8` as numbers."""
    return tuple(int(part) for part in text.split(","))


def _name(args: argparse.Namespace, world_size: int) -> str:
    """A file name that tells settings apart."""
    layers = "-".join(map(str, args.layers)) or "all"
    zero = args.deepspeed.stem if args.deepspeed is not None else f"zero{args.zero}"
    return (
        f"{args.shape}_{layers}-layers_{args.packs_per_rank}x{args.pack_len}_{args.dtype}_"
        f"recompute-{args.checkpointing}_{zero}_{world_size}-ranks"
    )
