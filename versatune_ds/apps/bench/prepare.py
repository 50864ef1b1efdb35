"""Measure `prepare` beside `datasets.map`: same rows, tokenizer, template and number of processes. No GPU.

    python -m versatune_ds.apps.bench.prepare --config FILE [--rounds 3] [--json FILE] [section.key=value ...]

Both sides run the training data of a configuration in turns, each in a new process with new caches; the files
were read once before. `datasets` gets what a user would write: `load_dataset` of each file, then
`map(batched=True, num_proc=data.num_workers)` of `apply_chat_template`, ids only. `prepare` also makes masks,
checks rows, counts repeats and hashes files. Both must give the same number of tokens. Reported are wall
seconds and CPU seconds of all processes, imports included; other work on the machine disturbs the first only.

What is not covered: hub data sets, pre-tokenised rows, rows that `prepare` refuses, and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.machine import describe_host

SIDES = ("prepare", "datasets")
MEASURED = ("versatune_ds", "tokenizers", "transformers", "datasets", "pyarrow")
SPEAKERS = {"human": "user", "gpt": "assistant"}
ANSWERED = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion")}
FORMATS = ("messages", "sharegpt", *ANSWERED)


def training_data(args: argparse.Namespace, *more: str) -> Config:
    """The settings without held-out data, which `datasets` is not given either."""
    config = load_config(args.config, [*args.overrides, *more])
    return config.model_copy(update={"data": config.data.model_copy(update={"eval": []})})


def run_datasets(config: Config, files: Sequence[tuple[str, str, Mapping[str, str]]]) -> int:
    """The other side; returns the number of tokens."""
    import datasets

    from versatune_ds.data.encode.tokenizer import load_tokenizer, set_chat_template

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config)
    set_chat_template(tokenizer, config.data.chat_template)
    tokens = 0
    for path, format, names in files:
        kind = "parquet" if path.endswith(".parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=path, split="train")
        encoded = rows.map(
            encode,
            batched=True,
            num_proc=config.data.num_workers,
            remove_columns=rows.column_names,
            fn_kwargs={"format": format, "names": names, "tokenizer": tokenizer},
        )
        tokens += sum(len(chunk.flatten()) for chunk in encoded.data["input_ids"].chunks)
    return tokens


def encode(batch: Any, format: str, names: Mapping[str, str], tokenizer: Any) -> dict[str, Any]:
    """Rows of a batch as token ids, as a user of `datasets` would write it."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    chats = [to_chat(row, format, lambda name: names.get(name, name)) for row in rows]
    return {"input_ids": tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False)}


def to_chat(row: Mapping[str, Any], format: str, name: Callable[[str], str]) -> list[dict[str, str]]:
    """The conversation of a row; `name` gives the file's name of a column."""
    if format == "messages":
        return [
            {"role": turn[name("role")], "content": turn[name("content")]} for turn in row[name("messages")]
        ]
    if format == "sharegpt":
        said = [(turn[name("from")], turn[name("value")]) for turn in row[name("conversations")]]
        spoken = [(SPEAKERS.get(speaker, speaker), text) for speaker, text in said]
    else:
        prompt, answer = (row[name(column)] for column in ANSWERED[format])
        extra = row.get(name("input")) if format == "alpaca" else None
        spoken = [("user", f"{prompt}\n\n{extra}" if extra else prompt), ("assistant", answer)]
    system = row.get(name("system"))
    spoken = [("system", system), *spoken] if system else spoken
    return [{"role": role, "content": content} for role, content in spoken]


def source_files(config: Config) -> list[tuple[str, str, dict[str, str]]]:
    """(path, format, columns) of every training file; prepares the data, which also warms the page cache."""
    from versatune_ds.data.cache.prepare import prepare
    from versatune_ds.data.rows.files import find_files

    reports = prepare(config, progress=False).reports
    formats = {file["path"]: file["format"] for r in reports for file in r.manifest["sources"]}
    files = [
        (file.path, formats[file.path], source.columns)
        for source in config.data.train
        for file in find_files(source.path, source.split).files
    ]
    for path, format, _ in files:
        if format not in FORMATS:
            raise SystemExit(f"bench.prepare: {path} has format {format}; allowed: {', '.join(FORMATS)}")
    return files


def measure(side: str, args: argparse.Namespace, files: str, overrides: Sequence[str]) -> dict[str, float]:
    """One side in a process of its own, with caches of its own: tokens, wall and CPU seconds, load."""
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        command = [sys.executable, "-m", "versatune_ds.apps.bench.prepare", "--config", args.config]
        command += ["--side", side, "--files", files]
        # One thread in each process on both sides; `datasets` keeps its caches below HF_HOME.
        environment = {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.monotonic()
        done = subprocess.run(
            [*command, *overrides, f"data.cache_dir={folder}/cache"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        wall_s, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"tokens": int(done.stdout.split()[-1]), "wall_s": wall_s, "cpu_s": cpu_s, "load_average": load}


def require_same_tokens(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> float:
    """Tokens of a side in a round; sides that did different work are not compared."""
    tokens = {one[side]["tokens"] for one in rounds for side in SIDES}
    if len(tokens) != 1:
        raise SystemExit(f"bench.prepare: the two sides made {sorted(tokens)} tokens; nothing is compared")
    return tokens.pop()


def compare(rounds: Sequence[Mapping[str, Mapping[str, float]]], what: str) -> float:
    """Median over the rounds of `datasets` / `prepare`: above 1, `prepare` is faster."""
    return statistics.median(one["datasets"][what] / one["prepare"][what] for one in rounds)


def run_rounds(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure both sides in turns, and give the result so far after each round.

    The side that begins changes with every round.
    """
    workers = training_data(args).data.num_workers or len(os.sched_getaffinity(0))
    overrides = [*args.overrides, f"data.num_workers={workers}"]
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        files = source_files(training_data(args, f"data.cache_dir={folder}/cache"))
        listed = Path(folder) / "files.json"
        listed.write_text(json.dumps(files))
        environment, rounds = describe_host(MEASURED), []
        for number in range(1, args.rounds + 1):
            sides = SIDES if number % 2 else SIDES[::-1]
            rounds.append({side: measure(side, args, str(listed), overrides) for side in sides})
            last = [(side, rounds[-1][side]) for side in SIDES]
            numbers = [
                f"{side} {took['wall_s']:.1f} s, CPU {took['cpu_s']:.1f} s, load {took['load_average']:.1f}"
                for side, took in last
            ]
            print(f"round {number}: {'; '.join(numbers)}", flush=True)
            yield {
                "environment": environment,
                "processes": workers,
                "files": len(files),
                "bytes": sum(os.path.getsize(path) for path, _, _ in files),
                "tokens": require_same_tokens(rounds),
                "rounds": rounds,
                "wall_ratio": compare(rounds, "wall_s"),
                "cpu_ratio": compare(rounds, "cpu_s"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, every round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    if args.side == "prepare":
        from versatune_ds.data.cache.prepare import prepare

        caches = prepare(training_data(args), progress=False).caches["train"]
        print(sum(cache.num_tokens for cache in caches if cache is not None))
    elif args.side == "datasets":
        print(run_datasets(training_data(args), json.loads(args.files.read_text())))
    else:
        for result in run_rounds(args):
            if args.json is not None:
                write_json_atomic(args.json, result)
        print(
            f"datasets / prepare, median of {args.rounds} rounds with {result['processes']} processes: "
            f"wall {result['wall_ratio']:.2f}, CPU {result['cpu_ratio']:.2f} (above 1: prepare is faster)"
        )


if __name__ == "__main__":
    main()
