"""Which checkpoints count as sound, what is kept, and how shards are written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from versatune_ds.config.schema import Checkpoint
from versatune_ds.engine.backend.zero_sizes import SUB_GROUP_KEY
from versatune_ds.engine.checkpointing import folder as ck
from versatune_ds.engine.checkpointing.hf_export import ShardWriter
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import sha256_file


def make(folder, step: int):
    """A finished checkpoint with two files."""
    path = folder / ck.checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "a.bin").write_bytes(b"a" * 100)
    (path / "b.bin").write_bytes(bytes([step]) * 50)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    return path


def damage_flip(path):
    data = bytearray((path / "a.bin").read_bytes())
    data[50] ^= 1
    (path / "a.bin").write_bytes(data)


DAMAGE = {
    "bit flipped": damage_flip,
    "truncated": lambda path: (path / "a.bin").write_bytes(b"a" * 99),
    "file missing": lambda path: (path / "b.bin").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: (path / "manifest.json").write_text('{"version": 1, "fil'),
}
REASONS = {
    "bit flipped": "a.bin has changed",
    "truncated": "99 bytes instead of 100",
    "file missing": "b.bin is missing",
    "no manifest": "manifest.json is missing",
    "torn manifest": "cannot be read",
}


def test_newest_sound_checkpoint_is_found(tmp_path):
    assert ck.newest_sound_checkpoint(tmp_path / "none") is None
    for step in (10, 9, 100):
        make(tmp_path, step)
    (tmp_path / ".unfinished-step-00000200").mkdir()
    assert ck.newest_sound_checkpoint(tmp_path).name == "step-00000100"


def test_a_new_checkpoint_removes_what_a_crash_left(tmp_path):
    (tmp_path / ".unfinished-step-00000004").mkdir()
    (tmp_path / ".latest.json.k3_x9a2b").write_text("{")
    make(tmp_path, 2)
    ck.begin(tmp_path, tmp_path / ck.unfinished_name(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-step-00000006", "step-00000002"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, kind, monkeypatch):
    reported = []
    monkeypatch.setattr(ck.log, "error", lambda text, *args: reported.append(text % args))
    make(tmp_path, 1)
    DAMAGE[kind](make(tmp_path, 2))
    assert ck.newest_sound_checkpoint(tmp_path).name == "step-00000001"
    (text,) = reported
    assert "step-00000002" in text and REASONS[kind] in text


def test_only_damaged_ones_are_an_error_and_not_a_fresh_start(tmp_path):
    damage_flip(make(tmp_path, 1))
    with pytest.raises(StateError, match="none of the 1 checkpoints is sound"):
        ck.newest_sound_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("needed", "kept"), [((), ["04", "08", "10", "12"]), ((2, 10), ["02", "04", "08", "10", "12"])]
)
def test_pruning_keeps_the_newest_and_milestones_and_what_is_needed(needed, kept, tmp_path):
    for step in (2, 4, 6, 8, 10, 12):
        make(tmp_path, step)
    ck.keep(tmp_path, Checkpoint(keep_last=2, milestone_every_n_steps=4), needed=needed)
    assert {int(p.name[-2:]) for p in tmp_path.iterdir()} == {4, 8, 10, 12, *needed}


def publish(folder, step: int, keep_last: int):
    """A new checkpoint of one rank, made the way a run does it."""
    temporary = folder / ck.unfinished_name(step)
    ck.begin(folder, temporary)
    (temporary / "a.bin").write_bytes(b"new")
    part = {"a.bin": {"bytes": 3, "sha256": sha256_file(temporary / "a.bin")}}
    (temporary / ck.part_name(0)).write_text(json.dumps(part))
    return ck.publish(temporary, step, 1, Checkpoint(keep_last=keep_last))


@pytest.mark.parametrize("keep_last", [1, 2])
def test_newer_ones_that_were_damaged_go_and_the_new_one_stays(tmp_path, keep_last):
    """A run that went on from step 2 saves 4; with keep_last 1 the damaged 6 would have outlived it."""
    make(tmp_path, 2)
    for step in (4, 6):
        damage_flip(make(tmp_path, step))
    final = publish(tmp_path, 4, keep_last)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["step-00000002", "step-00000004"][-keep_last:]
    assert ck.newest_sound_checkpoint(tmp_path) == final and (final / "a.bin").read_bytes() == b"new"
    assert sorted(path.name for path in final.iterdir()) == ["a.bin", "manifest.json"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"checkpoint": final.name, "step": 4}


@pytest.mark.parametrize(("ranks", "restored"), [(1, True), (2, False)])
def test_random_generators_go_on_where_they_were_with_as_many_ranks(tmp_path, ranks, restored):
    """Otherwise they are seeded from the checkpoint's name and the rank, the same each time."""
    path = tmp_path / "step-00000002"
    path.mkdir()
    torch.manual_seed(5)
    save_file(ck.generator_states(), path / ck.generator_name(0))
    expected = torch.rand(4)
    loaded = []
    backend = SimpleNamespace(load=lambda *arguments: loaded.append(arguments))
    drawn = []
    for seed in (6, 7):
        torch.manual_seed(seed)
        ck.load_model_state(path, backend, {"world_size": ranks, "layout": "as it was"})
        drawn.append(torch.rand(4))
    assert loaded == [(path, "as it was", ranks)] * 2
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], expected) == restored


OLDER = {
    "model.adapter": None,
    SUB_GROUP_KEY: 10**9,
    "optimizer.states": "fp32",
    "optimizer.kind": "adamw",
}
"""Of layouts that do not speak of these."""


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({}, None),
        ({"ZeRO stage": 2}, None),
        ({"optimizer offload": True}, None),
        ({"model.dtype": "fp32"}, "model.dtype 'bf16'; this run has 'fp32'"),
        ({"ZeRO stage": 0}, "ZeRO stage 3; this run has 0, and ZeRO stage 0 cannot go on"),
        ({"optimizer.kind": "muon"}, "optimizer.kind 'adamw'; this run has 'muon', and another optimizer"),
        ({"model.adapter": {"rank": 8}}, "model.adapter None; this run has {'rank': 8}, and another adapter"),
    ],
)
def test_what_a_run_can_go_on_from(tmp_path, layout, problem):
    """Any number of ranks, ZeRO stages 1 to 3, offload or not; not another precision, adapter or stage 0."""
    saved = {"ZeRO stage": 3, "model.dtype": "bf16", "optimizer offload": False}  # written before adapters
    state = {"version": 1, "world_size": 4, "layout": saved}
    (tmp_path / "versatune_state.json").write_text(json.dumps(state))
    if problem is None:
        read = ck.read_state(tmp_path, saved | OLDER | layout, {"hidden_size": "8"})
        assert read == state | {"layout": OLDER | saved}
    else:
        with pytest.raises(StateError, match=problem):
            ck.read_state(tmp_path, saved | OLDER | layout, {})


def test_only_a_model_that_a_checkpoint_names_otherwise_is_another_one(tmp_path):
    """Checkpoints did not always name it, and transformers adds keys."""
    state = {"version": 1, "world_size": 1, "layout": {"ZeRO stage": 2, "model.dtype": "bf16"}}
    ours = {"hidden_size": "8", "head_dim": "4"}
    for said in ({}, {"architecture": {}}, {"architecture": {"hidden_size": "8", "gone": "1"}}):
        (tmp_path / "versatune_state.json").write_text(json.dumps(state | said))
        assert ck.read_state(tmp_path, OLDER | state["layout"], ours)["world_size"] == 1
    (tmp_path / "versatune_state.json").write_text(json.dumps(state | {"architecture": {"hidden_size": "4"}}))
    with pytest.raises(StateError, match=r"another model: hidden_size is 4 there and 8 in model\.source"):
        ck.read_state(tmp_path, OLDER | state["layout"], ours)


def test_shards_are_bounded_and_indexed(tmp_path):
    tensors = {f"t{i}": torch.arange(100, dtype=torch.float32) + i for i in range(7)}  # 400 bytes each
    tensors["large"] = torch.zeros(500)
    writer = ShardWriter(tmp_path, max_bytes=1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == 7 * 400 + 2000
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) == 5 and files[0].name == "model-00001-of-00005.safetensors"
    for file in files:
        content = load_file(file)
        assert sum(t.nbytes for t in content.values()) <= 1000 or list(content) == ["large"]
        for name, tensor in content.items():
            assert index["weight_map"][name] == file.name and torch.equal(tensor, tensors[name])


def test_one_shard_needs_no_index(tmp_path):
    writer = ShardWriter(tmp_path, max_bytes=10**9)
    writer.add("t", torch.ones(3))
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
