"""The exported model goes to the hub only when asked, with a card of its run; against a stand-in."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from hub_server import HubServer
from launching import free_port
from safetensors.torch import save_file

from versatune_ds.cli.main import main
from versatune_ds.foundations.constants import EXIT_STATE
from versatune_ds.report.card import model_card
from versatune_ds.report.runs import read_run

TOKEN = "hf_" + "x" * 34
SETTINGS = {
    "model": {"source": "Qwen/Qwen2.5-7B", "dtype": "bf16", "adapter": {"kind": "lora", "rank": 8}},
    "data": {
        "train": [
            {"path": "/home/me/secret_place/law.jsonl", "domain": "law"},
            {"path": "hub:owner/chats", "domain": "code"},
        ],
        "eval": [{"path": ["/home/me/held.jsonl"], "domain": "law"}],
    },
    "domains": {"names": ["law", "code"], "initial": "/home/me/knowledge.json"},
    "weights": {"strategy": "fostering"},
    "deepspeed": "/home/me/zero3.json",
}


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def run(make_run):
    """A finished run of an adapter, with its export."""
    folder = make_run()
    (folder / "resolved.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "model").mkdir()
    save_file({"w": torch.ones(3)}, folder / "model" / "adapter_model.safetensors")
    (folder / "model" / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("public", [False, True])
def test_what_was_exported_lies_on_the_hub_with_its_card(hub, run, public, capsys):
    options = ["--public"] if public else []
    assert main(["export", str(run), "--push", "me/tuned", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(run / "model"),
        f"{hub.address}/me/tuned/commit/abc",
    ]
    assert hub.repositories == {"me/tuned": "public" if public else "private"}
    assert (
        hub.files["adapter_model.safetensors"] == (run / "model" / "adapter_model.safetensors").read_bytes()
    )
    assert set(hub.files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert hub.files["README.md"].decode() == model_card(read_run(run), None, is_adapter=True)


def test_the_card_holds_the_run_and_no_path_of_this_machine(run):
    card = model_card(read_run(run), 10, is_adapter=True)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen2.5-7B" and head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft" and head["tags"] == ["versatune-ds", "sft", "lora"]
    for text in (
        "after step 10.",
        "up to step 20",
        "5.250 → 2.125",  # held-out loss of law, before and after
        "| law | law.jsonl | train |",
        "| code | hub:owner/chats | train |",
        "| law | held.jsonl | eval |",
        "strategy: fostering",
        "initial: knowledge.json",
        "torch 2.13.0",
    ):
        assert text in card, text
    assert "/home" not in card and "secret_place" not in card


def test_a_model_that_was_kept_as_the_best_one_is_of_its_step(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 15, "loss": 2.0, "select": "overall"}))
    assert "after step 15." in model_card(read_run(run), None, is_adapter=True)


def test_a_whole_model_of_a_local_folder_names_no_base(run):
    settings = SETTINGS | {"model": {"source": str(run)}}
    (run / "resolved.yaml").write_text(yaml.safe_dump(settings))
    card = model_card(read_run(run), None, is_adapter=False)
    head = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in head and head["library_name"] == "transformers"
    assert str(run) not in card


def test_nothing_is_pushed_without_being_asked(hub, run, capsys):
    assert main(["export", str(run)]) == 4  # no checkpoint to export
    assert main(["export", str(run), "--public"]) == 2
    assert not hub.tokens and not (run / "model" / "README.md").exists()


def test_a_hub_that_cannot_be_reached_is_said(hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert main(["export", str(run), "--push", "me/tuned"]) == 9
    assert "the same command tries again" in capsys.readouterr().err


def test_a_hub_that_refuses_is_said_without_the_token(hub, run, capsys):
    hub.refuse = f"token {TOKEN} may not write"
    assert main(["export", str(run), "--push", "me/tuned"]) == 9
    said = capsys.readouterr().err
    assert "could not be pushed to me/tuned" in said and "HF_TOKEN" in said and TOKEN not in said
    assert json.dumps(hub.files) == "{}"


def test_a_step_that_is_not_there_is_not_the_finished_model(hub, run, capsys):
    assert main(["export", str(run), "--step", "0", "--push", "me/tuned"]) == EXIT_STATE
    assert "holds no such checkpoint" in capsys.readouterr().err


def test_a_card_of_the_users_own_stays(hub, run, capsys):
    """Ours is one of the export's files, which another export replaces."""
    (run / "model" / "versatune_export.json").write_text('{"files": ["adapter_config.json"]}')
    for _ in range(2):
        assert main(["export", str(run), "--push", "me/tuned"]) == 0
    listed = json.loads((run / "model" / "versatune_export.json").read_text())["files"]
    assert listed == ["README.md", "adapter_config.json"]
    (run / "model" / "README.md").write_text("# My own words")
    assert main(["export", str(run), "--push", "me/tuned"]) == EXIT_STATE
    assert "holds README.md, which this program did not write" in capsys.readouterr().err
    assert (run / "model" / "README.md").read_text() == "# My own words"
