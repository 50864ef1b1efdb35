"""Benchmark of the fused linear + cross-entropy against its rivals, on a GPU or a CPU.

    python kernels/benchmarks/fused_loss.py                        # a GPU when there is one, else the CPU
    python kernels/benchmarks/fused_loss.py --size tiny            # seconds, to see that it works
    python kernels/benchmarks/fused_loss.py --size quick --minutes 2    # a first look at a GPU
    python kernels/benchmarks/fused_loss.py --head qwen2.5-32b llama-3-8b --tokens 8192 --supervised 1 0.3

Every candidate runs in a process of its own, in rotation with the others, after it has passed a
comparison with fp64. Prints a table and writes results.json and table.md (after every number) and,
where matplotlib is installed, picture.png into kernels/benchmarks/results/fused_loss_HARDWARE_DATE.
docs/benchmarks.md explains the columns.

What is not covered: a training step (`versatune-ds bench` measures it) and several GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Both source roots by hand: the benchmark must run from a checkout that is not installed, in every process.
for folder in (HERE.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from loss_bench.cases import DTYPES, GPU_HEADS, HEADS, Case, Head, plan_cases  # noqa: E402

MIN_TOKENS = 8
GPU_SHARES = [1.0, 0.5, 0.3, 0.1]
SIZES: dict[str, dict[str, Any]] = {
    "star": {
        "head": list(GPU_HEADS),
        "tokens": [1024, 2048, 4096, 8192, 16384, 32768],
        "supervised": GPU_SHARES,
    },
    "quick": {"head": ["qwen2.5-32b"], "tokens": [8192], "supervised": GPU_SHARES[:3]},
    "small": {"head": ["small"], "tokens": [512, 1024], "supervised": [1.0, 0.3]},
    "tiny": {"head": ["tiny"], "tokens": [64], "supervised": [1.0]},
}
"""`star` and `quick` are made for GPUs, `small` for CPUs, `tiny` shows on either that it works."""


def main() -> int:
    """Parse, measure, write."""
    begun = time.monotonic()
    args = parse_arguments()
    if args.worker:
        from loss_bench.worker import serve

        serve(args.worker, args.device)
        return 0
    # One thread, as a CPU rank of the trainer has: CPU time of several counts their waiting for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from loss_bench.candidates import CANDIDATES
    from loss_bench.driver import CPU_PROTOCOL, GPU_PROTOCOL

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = set(args.candidates or ()) - set(CANDIDATES)
    if unknown:
        raise SystemExit(f"unknown candidate {sorted(unknown)[0]!r}; known: {', '.join(CANDIDATES)}")
    protocol = GPU_PROTOCOL if device == "cuda" else CPU_PROTOCOL
    if args.rounds is not None:
        protocol = protocol._replace(rounds=args.rounds)
    run(args, device, protocol, begun + 60 * args.minutes)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: star on a GPU, small on a CPU")
    parser.add_argument("--head", nargs="+", choices=HEADS, help="instead of the size's")
    parser.add_argument("--tokens", nargs="+", type=int, help="N, rows of hidden states")
    parser.add_argument("--supervised", nargs="+", type=float, help="shares of rows that have a label")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16; on a CPU also float32")
    parser.add_argument("--sweep", choices=("star", "full"), help="one axis at a time (GPU default), or all")
    parser.add_argument("--sharpness", type=float, default=3.0, help="standard deviation of the logits")
    parser.add_argument(
        "--states",
        type=Path,
        metavar="FILE",
        help="real states instead: a safetensors file with hidden [M, H], weight [V, H], labels [M]",
    )
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="default: all that are installed")
    parser.add_argument("--rounds", type=int, help="turns of every variant (default: 5)")
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=math.inf,
        help="end after so many; every candidate's default and every case come first",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the results")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that FOLDER has, measure the others"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def minutes(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 minutes are needed")
    return value


def planned_cases(args: argparse.Namespace, device: str) -> list[Case]:
    """The cases that the command line asks for."""
    size = SIZES[args.size or ("star" if device == "cuda" else "small")]
    tokens = args.tokens or size["tokens"]
    if min(tokens) < MIN_TOKENS:
        raise SystemExit(f"--tokens {min(tokens)}: the comparison with fp64 needs {MIN_TOKENS} rows")
    supervised = args.supervised or size["supervised"]
    dtypes = args.dtype or (["bfloat16"] if device == "cuda" else ["float32", "bfloat16"])
    sweep = args.sweep or ("star" if device == "cuda" else "full")
    heads = args.head or size["head"]
    if args.states is not None:
        from safetensors import safe_open

        with safe_open(args.states, framework="pt") as file:
            vocab_size, hidden_size = file.get_slice("weight").get_shape()
        HEADS[args.states.stem] = Head(hidden_size, vocab_size)
        heads = [args.states.stem]
    cases = plan_cases(heads, tokens, supervised, dtypes, sweep=sweep, sharpness=args.sharpness)
    if args.states is None:
        return cases
    return [Case(**{**case.__dict__, "states": str(args.states.resolve())}) for case in cases]


def run(args: argparse.Namespace, device: str, protocol: Any, ends_at: float) -> None:
    """Measure all cases; after every number the files are complete up to it.

    Args:
        ends_at: `time.monotonic()` after which nothing is measured.
    """
    from loss_bench import driver, picture, results
    from loss_bench.candidates import CANDIDATES

    asked = args.candidates or list(CANDIDATES)
    missing = {name: reason for name in asked if (reason := why_not(CANDIDATES[name], device)) is not None}
    names = [name for name in CANDIDATES if name in asked and name not in missing]
    environment = results.describe_environment(device)
    document: dict[str, Any] = {
        "schema_version": results.SCHEMA_VERSION,
        "kind": "fused_loss",
        "command": " ".join(["python", "kernels/benchmarks/fused_loss.py", *sys.argv[1:]]),
        "environment": environment,
        "protocol": protocol._asdict(),
        "missing": missing,
        "versions_of_candidates": {name: CANDIDATES[name].version() for name in names},
        "complete": False,
        "ended": None,
        "cases": [],
    }
    hardware = environment.get("gpu") or f"{environment['cpu']}-{environment['cpu_count']}-cores"
    name = f"fused_loss_{results.slug(hardware)}_{environment['date']}"
    out = args.out or HERE / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    workers = driver.Workers(device, protocol.timeout_s)
    cases = planned_cases(args, device)
    if args.resume:
        document["cases"] = measured_before(out, environment)
        cases = [case for case in cases if case.to_json() not in [c["case"] for c in document["cases"]]]
    write(document, out)
    try:
        for i, case in enumerate(cases):
            say(f"case {i + 1} of {len(cases)}")
            until = time.monotonic() + (ends_at - time.monotonic()) / (len(cases) - i)
            measured: list[dict[str, Any]] = document["cases"]
            card: dict[str, str] = {}

            def changed(
                entries: list[dict[str, Any]],
                case: Case = case,
                card: dict[str, str] = card,
                measured: list[dict[str, Any]] = measured,
            ) -> None:
                summary = results.summarise(case.to_json(), entries, device)
                summary["commit"] = environment["commit"]
                summary["measured_at"] = time.strftime("%Y-%m-%d %H:%M")
                summary["load_average"] = list(os.getloadavg())
                summary["card_under_load"] = card or None
                document["cases"] = [*measured, summary]
                write(document, out)

            slow = results.too_slow(measured, case.to_json(), protocol.too_slow_s)
            entries, complete = driver.measure_case(
                case, names, device, protocol, workers, say, slow, changed, until
            )
            ceiling = next((e for e in entries if e["candidate"] == results.CEILING and e.get("s")), None)
            if device == "cuda" and ceiling is not None:
                card.update(driver.read_under_load(case, ceiling, workers, results.read_first_card, ends_at))
            changed(entries)
            document["cases"][-1]["complete"] = complete
        document["complete"] = all(case["complete"] for case in document["cases"])
        document["ended"] = (
            "all measured" if document["complete"] else f"time limit of {args.minutes:g} minutes"
        )
        write(document, out)
        if (why := picture.draw(document, out / "picture.png")) is not None:
            say(f"no picture: {why}")
    finally:
        workers.close()
    print(results.table(document))
    say(f"written: {out}")


def measured_before(out: Path, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases of an earlier run in this folder; each keeps the commit and time it was measured with."""
    path = out / "results.json"
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    for key in ("cpu", "cpu_count", "gpu", "threads", "versions"):
        if document["environment"].get(key) != environment.get(key):
            raise SystemExit(f"--resume: {path} was measured with another {key}; choose another --out")
    return [case for case in document["cases"] if case.get("complete")]


def why_not(candidate: Any, device: str) -> str | None:
    """Why a candidate is not measured, or None."""
    if device not in candidate.on:
        return f"does not run on {'CPUs' if device == 'cpu' else 'GPUs'}"
    return candidate.missing()


def write(document: dict[str, Any], out: Path) -> None:
    """results.json, replaced in one piece, and table.md."""
    from loss_bench import results

    temporary = out / ".results.json"
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / "results.json")
    (out / "table.md").write_text(results.table(document), encoding="utf-8")


def say(text: str) -> None:
    """A line for people, beside the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
