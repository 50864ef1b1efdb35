"""Nothing is lost at the end, and nothing is deleted that is not ours.

What only the export would find is found before the first step; what it finds all the same costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml
from plain_backend import plain_run
from small_runs import prepare_run, small_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from versatune_ds.engine.checkpointing import export_target
from versatune_ds.engine.checkpointing.hf_export import ShardWriter
from versatune_ds.foundations.errors import ConfigError, SaveError, StateError, VersaTuneError

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "eos_token_id": 2}
"""Flags that transformers takes from a folder and refuses to save again: there is no do_sample."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 1},
        train={"max_steps": 2},
        model={"dtype": "fp32"},
    )
    base = folder / "base"
    shutil.copytree(folder / "sample" / "model", base)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps(SAMPLING))
    return config


def train(config: Path, run: Path, *overrides: str) -> None:
    plain_run(config, f"run.dir={run}", *overrides)


def refused(config: Path, run: Path, kind: type[VersaTuneError], match: str, *overrides: str) -> None:
    """Before a step was taken."""
    with pytest.raises(kind, match=match):
        train(config, run, *overrides)
    assert not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text() == "kept"


def pretrained(config: Path) -> list[str]:
    return [f"model.source={config.parent / 'base'}", "model.weights=pretrained"]


# --- what others check only at the export -------------------------------------------------------------------


def test_a_generation_config_that_transformers_does_not_save_goes_into_the_model_as_it_is(
    config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("versatune_ds.engine.checkpointing.hf_export.log.propagate", True)
    with pytest.raises(ValueError, match="Fix these issues"):
        changed = GenerationConfig.from_pretrained(config.parent / "base")
        changed.eos_token_id = 3
        changed.save_pretrained(tmp_path)
    train(config, tmp_path / "run", *pretrained(config))
    found = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert {key: found[key] for key in ("temperature", "top_p")} == {"temperature": 0.6, "top_p": 0.9}
    assert found["eos_token_id"] == tokenizer.convert_tokens_to_ids("</s>") and "do_sample" not in found
    assert "as model.source has it" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_a_generation_config_that_cannot_be_read_is_refused(config, tmp_path):
    base = shutil.copytree(config.parent / "base", tmp_path / "base")
    (base / "generation_config.json").write_text('{"max_new_tokens": -1}')
    overrides = [*pretrained(config), f"model.source={base}"]
    refused(config, tmp_path / "run", ConfigError, "refuses its generation_config.json", *overrides)


@pytest.mark.parametrize("what", ["tokenizer", "architecture"])
def test_what_a_library_refuses_to_save_is_found_before_the_first_step(config, tmp_path, monkeypatch, what):
    def refuse(*_: Any, **__: Any) -> None:
        raise AttributeError("cannot be saved")

    from transformers import LlamaConfig, PreTrainedTokenizerBase

    monkeypatch.setattr(
        PreTrainedTokenizerBase if what == "tokenizer" else LlamaConfig, "save_pretrained", refuse
    )
    match = "could not be saved at its end: AttributeError: cannot be saved.*export_at_end: false"
    refused(config, tmp_path / "run", ConfigError, match)
    assert not list((tmp_path / "run").glob(".unfinished*"))
    train(config, tmp_path / "run", "checkpoint.export_at_end=false")


def test_a_disk_without_room_for_the_model_is_found_before_the_first_step(config, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(export_target.shutil, "disk_usage", lambda _: usage(1000))
    match = r"takes 0.000\d+ GB, and 1e-06 GB are free.*export_at_end: false"
    refused(config, tmp_path / "run", StateError, match)


# --- whose files lie there ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("model/config.json", "{}"), ("checkpoints/step-00000001/mine", "kept"), ("metrics.jsonl", "kept")],
)
def test_files_that_no_run_wrote_are_refused_and_stay(config, tmp_path, name, content):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    kind = path.relative_to(tmp_path / "run").parts[0]
    refused(config, tmp_path / "run", StateError, f"holds {kind}, which no run of this program wrote")
    assert path.read_text() == content


def test_a_file_added_to_a_finished_model_is_not_deleted(config, tmp_path):
    run = tmp_path / "run"
    every_step = "checkpoint.every_n_steps=1"
    train(config, run, every_step)
    train(config, run, every_step)  # its own files are replaced
    (run / "model" / "notes.md").write_text("mine")
    with pytest.raises(StateError, match=r"wrote \(notes.md\), and would be replaced as a whole"):
        train(config, run, every_step)
    assert (run / "model" / "notes.md").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained(run / "model")


def test_a_model_to_start_from_may_not_lie_in_the_run_folder(config, tmp_path):
    base = shutil.copytree(config.parent / "base", tmp_path / "run" / "model")
    before = sorted(path.name for path in base.iterdir())
    overrides = [*pretrained(config), f"model.source={base}"]
    refused(config, tmp_path / "run", ConfigError, "model.source: .* lies in run.dir", *overrides)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    match = "model.tokenizer: .* lies in run.dir"
    refused(config, tmp_path / "elsewhere", ConfigError, match, f"model.tokenizer={base}")
    match = "start_from: .* lies in run.dir"
    refused(config, tmp_path / "run", ConfigError, match, f"model.adapter={{start_from: {{{base}: 1.0}}}}")
    assert sorted(path.name for path in base.iterdir()) == before


# --- links --------------------------------------------------------------------------------------------------


def test_links_are_followed(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model", "checkpoints"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (run / name).symlink_to(tmp_path / "disk" / name)
    overrides = ["checkpoint.every_n_steps=1", "checkpoint.keep_last=1"]
    train(config, run, *overrides)
    assert (run / "model").is_symlink() and (tmp_path / "disk" / "model" / "model.safetensors").is_file()
    moved = (tmp_path / "disk" / "checkpoints" / "step-00000002").rename(tmp_path / "disk" / "moved")
    (tmp_path / "disk" / "checkpoints" / "step-00000002").symlink_to(moved)
    train(config, run, "train.max_steps=3", *overrides)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert (moved / "manifest.json").is_file()  # the link was ours to remove, not what it led to


@pytest.mark.parametrize("name", ["model", "checkpoints"])
def test_links_to_nowhere_are_refused(config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "gone")
    refused(config, tmp_path / "run", StateError, "no folder")


# --- the last resort ----------------------------------------------------------------------------------------


def test_an_export_that_fails_leaves_the_weights_and_the_command_that_writes_the_model(
    config, tmp_path, monkeypatch
):
    run, flush = tmp_path / "a run", ShardWriter._flush

    def fail(self: ShardWriter) -> None:
        raise RuntimeError("a bug of a library")

    monkeypatch.setattr(ShardWriter, "_flush", fail)
    with pytest.raises(SaveError, match="a bug of a library") as error:
        train(config, run, "checkpoint.every_n_steps=null")
    *_, command = str(error.value).splitlines()
    assert command == f"versatune-ds export '{run}' --step 2 --out '{run}/model'"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert not list(run.glob("*model*"))
    monkeypatch.setattr(ShardWriter, "_flush", flush)
    train(config, run)  # or the same command again: no step is left
    assert (run / "model" / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


# --- going on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    train(config, run, "checkpoint.every_n_steps=1", "train.max_steps=3", "checkpoint.export_at_end=false")
    return run


def test_a_run_does_not_go_on_as_another_one(config, begun, tmp_path):
    """Each with what is other and the way out; what was there stays."""
    run, folder = shutil.copytree(begun, tmp_path / "run"), config.parent
    deeper = shutil.copytree(folder / "sample" / "model", tmp_path / "deeper")
    architecture = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(architecture | {"num_hidden_layers": 3}))
    raw = yaml.safe_load(config.read_text())
    law, medicine, *others = raw["data"]["train"]
    names = [*raw["domains"]["names"], "new"]
    more = {"domains": {"names": names}, "weights": {}}
    files = {
        "more": raw
        | more
        | {"data": raw["data"] | {"train": [law, medicine, *others, law | {"domain": "new"}]}},
        "swapped": raw
        | {"data": raw["data"] | {"train": [law | {"path": medicine["path"]}, medicine, *others]}},
    }
    for name, settings in files.items():
        (tmp_path / name).mkdir()
        files[name] = prepare_run(tmp_path / name, settings)
    model = [f"model.source={deeper}", f"model.tokenizer={deeper}"]
    cases = [
        (config, model, "num_hidden_layers is 2 there and 3 in"),
        (config, ["train.max_steps=2"], "3 steps are done, and train.max_steps or train.epochs asks for 2"),
        (files["more"], [], r"domains.names changed \(added new\) since step 3; set that back"),
        (files["swapped"], [], "training data of law changed .* since step 3; set that back"),
    ]
    for settings, overrides, problem in cases:
        with pytest.raises(StateError, match=problem) as error:
            train(settings, run, "checkpoint.every_n_steps=1", "train.max_steps=3", *overrides)
        assert "Or choose another run.dir for a new run" in str(error.value)
        assert str(error.value).splitlines()[-1] == f"versatune-ds export {run} --step 3"
    assert (run / "metrics.jsonl").read_text() == (begun / "metrics.jsonl").read_text()
    assert not (run / "model").exists()
    train(config, run, "checkpoint.every_n_steps=1", "train.max_steps=4")


def test_a_file_that_is_a_link_is_written_where_it_leads_to(tmp_path):
    from versatune_ds.foundations.files import write_json_atomic

    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "file.json")
    write_json_atomic(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "disk" / "file.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path / "disk") == ["file.json"]
