"""Data sets of the three trainers as our sources: every one becomes a domain, under its own name.

What is not covered: preference data, pre-training on plain text, images (refused or said).
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from versatune_ds.apps.move_in.foreign import Foreign
from versatune_ds.data.rows.files import HUB_PREFIX, find_files
from versatune_ds.data.rows.readers import read_blocks
from versatune_ds.foundations.errors import ConfigError, unknown_name

Source = dict[str, Any]
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
ROLE_KEYS = {"from", "role"}
CONTENT_KEYS = {"value", "content"}
QUESTIONS = {"prompt": "question", "completion": "answer"}
AXOLOTL_TYPES: dict[str, tuple[str | None, dict[str, str]]] = {
    "chat_template": (None, {}),
    "sharegpt": ("sharegpt", {}),
    "alpaca": ("alpaca", {}),
    "input_output": (None, {}),
    "alpaca_chat.load_qa": ("prompt_completion", QUESTIONS),
}
"""Type of a data set -> our format (None: told from its columns) and columns."""
LEFT_OF_DATA = {
    **dict.fromkeys(
        ("val_size", "val_set_size", "test_split_size"),
        "held-out rows are files of their own here: put some aside, name them in data.eval",
    ),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "only the assistant's turns are trained on"),
}
"""Key -> why it is not carried over."""
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def carry_data(given: Foreign, train: Sequence[Source], held_out: Sequence[Source], shares: Any) -> None:
    """Sources, domains and their weights.

    Args:
        train: sources with a `domain` each.
        held_out: the same; those of a domain that is not trained on are left, with a note.
        shares: of the sources of `train` in the mixture, if the trainer was given any.
    """
    given.leave_all(LEFT_OF_DATA)
    names = list(dict.fromkeys(source["domain"] for source in train))
    known = [source for source in held_out if source["domain"] in names]
    for source in held_out:
        if source not in known:
            given.note(
                "data",
                f"held-out {source['path']} is of no domain that is trained on; give it one in data.eval",
            )
    given.set("data", train=list(train), eval=known or None, overlong="truncate")
    initial: Any = "uniform"
    if shares:
        total = sum(shares)
        initial = _rounded({name: share / total for name, share in zip(names, shares, strict=True)})
        given.note("domains", "shares as theirs")
    elif len(names) > 1 and (rows := _rows(train)):
        initial = _rounded({name: rows[name] / sum(rows.values()) for name in names})
        given.note("domains", "shares by rows, as theirs: each row once an epoch")
    elif len(names) > 1:
        given.note(
            "domains",
            "theirs: every row once an epoch. Set `initial` to each one's share of the rows for the same.",
        )
    given.set("domains", names=names, initial=initial)
    given.note("domains", "weights.strategy moves them (docs/weights.md); constant, the default, does not.")


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    """To four decimals, and together still 1."""
    rounded = {name: round(share, 4) for name, share in shares.items()}
    rounded[max(rounded, key=lambda name: rounded[name])] += 1 - sum(rounded.values())
    return {name: round(share, 4) for name, share in rounded.items()}


def _rows(sources: Sequence[Source]) -> dict[str, int] | None:
    """Rows by domain; None where a source is not on this machine."""
    counts: dict[str, int] = {}
    for source in sources:
        paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
        if not all(os.path.exists(path) for path in paths):
            return None
        files = find_files(source["path"], source.get("split", "train")).files
        rows = sum(block.num_rows for file in files for block in read_blocks(file))
        counts[source["domain"]] = counts.get(source["domain"], 0) + rows
    return counts


def _columns(pairs: dict[str, Any]) -> dict[str, str]:
    """Those whose name in the file is another one than ours."""
    return {ours: theirs for ours, theirs in pairs.items() if theirs and theirs != ours}


def _source(path: Any, domain: str, format: str | None, columns: dict[str, str], split: str | None) -> Source:
    given = {"format": format, "columns": columns, "split": None if split == "train" else split}
    return {"path": path, "domain": domain, **{key: value for key, value in given.items() if value}}


def _path(text: str) -> str:
    """A path if there is one, or it looks like one; else the name of a data set on the hub."""
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and Path(text).suffix not in SUFFIXES
    return f"{HUB_PREFIX}{text}" if is_name and not os.path.exists(text) else text


def _name(path: str | Sequence[Any], taken: Sequence[str]) -> str:
    """A name for a domain that is made from a path, or the first one, and not taken."""
    first = path if isinstance(path, str) else str(path[0])
    stem = first.removeprefix(HUB_PREFIX).rstrip("/").rsplit("/", 1)[-1].partition(".")[0] or "data"
    numbered = (f"{stem}_{n}" for n in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def llama_factory_data(given: Foreign) -> None:
    """`dataset` and `eval_dataset`, looked up in dataset_info.json of `dataset_dir`."""
    folder = str(given.take("dataset_dir"))
    names, held_out = (_listed(given.take(key)) for key in ("dataset", "eval_dataset"))
    known: dict[str, Any] = {}
    if folder != "ONLINE":
        path = Path(folder) / "dataset_info.json"
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file, which says where {', '.join(names)} lie; run this where "
                "LLaMA-Factory is run, or give dataset_dir in the settings as seen from here"
            )
        known = json.loads(path.read_text(encoding="utf-8"))
    sources = [[_registered(given, folder, known, name) for name in listed] for listed in (names, held_out)]
    shares = given.take("interleave_probs")
    strategy = given.take("mix_strategy")
    if strategy not in (None, "concat"):
        given.leave("mix_strategy", strategy, "a run ends after train.epochs times the tokens of all domains")
    carry_data(given, sources[0], sources[1], [float(share) for share in _listed(shares)] if shares else None)


def _listed(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts]


def _registered(given: Foreign, folder: str, known: dict[str, Any], name: str) -> Source:
    if folder == "ONLINE":
        return _source(HUB_PREFIX + name, name, None, {}, None)
    if name not in known:
        raise ConfigError(f"{folder}/dataset_info.json: {unknown_name('data set', name, known)}")
    entry = Foreign(known[name])
    columns, tags = dict(entry.take("columns") or {}), entry.take("tags") or {}
    if entry.is_on("ranking") or "kto_tag" in columns:
        raise ConfigError(f"data set {name}: preferences; only supervised fine-tuning is done here")
    hub, file = entry.take("hf_hub_url"), entry.take("file_name")
    if not (hub or file):
        raise ConfigError(f"data set {name}: neither hf_hub_url nor file_name is given; make it a file first")
    form = str(entry.take("formatting") or "alpaca")
    split = entry.take("split")
    beside = {key: columns.get(key) for key in ("system", "tools")}
    if form == "alpaca":
        ours = {alpaca: columns.get(theirs) for theirs, alpaca in ALPACA.items()}
        source_format = "alpaca"
        mapped = _columns({**ours, **beside, "history": columns.pop("history", None)})
    else:
        is_openai = tags.get("role_tag") == "role"
        source_format = "messages" if is_openai else "sharegpt"
        ours_name = "messages" if is_openai else "conversations"
        mapped = _columns({ours_name: columns.get("messages"), **beside})
        for tag, fine in (("role_tag", ROLE_KEYS), ("content_tag", CONTENT_KEYS)):
            if tags.get(tag, next(iter(fine))) not in fine:
                given.leave(
                    f"dataset_info.json: {name}.tags.{tag}",
                    tags[tag],
                    f"rename the field to one of {sorted(fine)}",
                )
    for column in ("history", "images", "videos", "audios"):
        if columns.get(column):
            given.leave(
                f"dataset_info.json: {name}.columns.{column}",
                columns[column],
                "rows that hold it are refused",
            )
    entry.hand_over(given, f"dataset_info.json: {name}")
    path = f"{HUB_PREFIX}{hub}" if hub else str(Path(folder) / str(file))
    return _source(path, name, source_format, mapped, split)


def axolotl_data(given: Foreign) -> None:
    """`datasets` and `test_datasets`."""
    sources: list[list[Source]] = []
    for key in ("datasets", "test_datasets"):
        found: list[Source] = []
        for i, entry in enumerate(given.take(key) or []):
            taken = [source["domain"] for source in found]
            found.append(_axolotl_source(given, f"{key}[{i}]", entry, taken))
        sources.append(found)
    carry_data(given, sources[0], sources[1], None)


def _axolotl_source(given: Foreign, place: str, values: dict[str, Any], taken: Sequence[str]) -> Source:
    entry = Foreign(values)
    path, files = str(entry.take("path")), entry.take("data_files")
    kind = entry.take("type")
    entry.take("ds_type")
    mapping = entry.take("message_property_mappings") or {}
    fields = [mapping.get(key) or entry.take(f"message_field_{key}") for key in ("role", "content")]
    messages = entry.take("field_messages")
    if isinstance(kind, dict):  # a type of one's own: columns by name
        columns = {
            alpaca: kind.get(f"field_{alpaca}") for alpaca in ("instruction", "input", "output", "system")
        }
        source_format: str | None = "alpaca"
        for key in ("format", "no_input_format", "system_prompt", "system_format"):
            if kind.get(key):
                given.leave(f"{place}.type.{key}", kind[key], "data.chat_template says how rows become text")
    else:
        name = str(kind or "alpaca")
        if name not in AXOLOTL_TYPES:
            given.leave(f"{place}.type", name, "the format is told from the columns (docs/data.md)")
        source_format, known = AXOLOTL_TYPES.get(name, (None, {}))
        columns = dict(known)
        if messages:
            columns["conversations" if source_format == "sharegpt" else "messages"] = messages
            if source_format is None and fields[0] == "from":
                source_format, columns = "sharegpt", {"conversations": messages}
    for field, fine in zip(fields, (ROLE_KEYS, CONTENT_KEYS), strict=True):
        if field and field not in fine:
            given.leave(
                f"{place}.message_property_mappings", field, f"rename the field to one of {sorted(fine)}"
            )
    for key, usual in (
        ("roles_to_train", ["assistant"]),
        ("roles_to_train", ["gpt", "assistant"]),
        ("train_on_eos", "turn"),
    ):
        if values.get(key) == usual:
            entry.take(key)
    roles = entry.take("roles") or {}
    if any(alias != role for role, aliases in roles.items() for alias in aliases):
        given.note("data", f"{place}.roles: docs/data.md has the names of roles that are read")
    split = str(entry.take("split") or "train")
    if "[" in split:
        given.leave(f"{place}.split", split, "the whole split is read")
    entry.hand_over(given, place)
    where = files if files else _path(path)
    return _source(where, _name(where, taken), source_format, _columns(columns), split.partition("[")[0])


def trl_data(given: Foreign) -> None:
    """`dataset_name`, `datasets`, or the alignment handbook's `dataset_mixture`."""
    mixture = given.take("dataset_mixture") or {}
    entries = mixture.get("datasets") or given.take("datasets") or []
    name = given.take("dataset_name")
    split, test = given.take("dataset_train_split"), given.take("dataset_test_split")
    if not entries:
        entries = [{"path": name, "name": given.take("dataset_config"), "split": split}]
    sources: list[Source] = []
    for i, values in enumerate(entries):
        entry = Foreign(values, {"id": "path", "config": "name"})
        path, files = str(entry.take("path")), entry.take("data_files")
        config = entry.take("name")
        if config not in (None, "default"):
            given.leave(
                f"datasets[{i}].name",
                config,
                "configurations of hub data sets are not known; name their files",
            )
        entry.take("columns"), entry.take("fraction")
        entry.leave_all({"weight": "a share of the rows; all are read, domains.initial says how often"})
        where = files if files and not isinstance(files, dict) else _path(path)
        taken = [source["domain"] for source in sources]
        sources.append(_source(where, _name(where, taken), None, {}, entry.take("split")))
        entry.hand_over(given, f"datasets[{i}]")
    given.put("test_split_size", mixture.get("test_split_size") or given.peek("test_split_size"))
    fractions = [values.get("fraction") for values in entries]
    evaluated = given.peek("eval_strategy") not in (None, "no", False)
    held_out = [{**sources[0], "split": test}] if evaluated and name and test else []
    carry_data(given, sources, held_out, fractions if all(fractions) else None)
    if not given.is_on("assistant_only_loss"):
        given.note(
            "data",
            "only the assistant's turns or the completions are trained on; theirs may train on prompts, too",
        )
