"""Atomic files, error places, and agreement without a group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launching import launch_soundly

from versatune_ds.foundations import distributed, files
from versatune_ds.foundations.errors import DataError, unknown_name
from versatune_ds.foundations.text import in_columns, is_blank


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_json_atomic(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_json_atomic(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_what_a_killed_writer_left_can_be_removed(tmp_path):
    path = tmp_path / "state.json"
    for name in ("state.json", ".state.jsonl.abc", ".state.json.swp", "other"):
        (tmp_path / name).write_text("stays")
    kill = "os.replace = lambda *names: os.kill(os.getpid(), 9)"
    write = "files.write_json_atomic(pathlib.Path(sys.argv[1]), {})"
    code = f"import os, pathlib, sys; from versatune_ds.foundations import files; {kill}; {write}"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert len(list(tmp_path.glob(".state.json.*"))) == 2
    stay = [".state.json.swp", ".state.jsonl.abc", "other"]  # an editor's, for one
    files.remove_temporaries(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*stay, "state.json"]


def test_written_files_have_ordinary_permissions(tmp_path):
    files.write_text_atomic(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_made_durable_file_by_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    files.fsync_tree(tmp_path)
    assert synced[-1] == tmp_path.stat().st_ino  # the names last
    assert set(synced) == {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "b")}


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json_atomic(tmp_path / "x", {"a": float("nan")})


def test_equal_values_have_equal_hashes():
    assert files.canonical_hash({"b": 1, "a": [2]}) == files.canonical_hash({"a": [2], "b": 1})
    assert files.canonical_hash({"a": 1}) != files.canonical_hash({"a": 1.5})


def test_data_errors_name_their_place():
    assert str(DataError("bad", path="a.jsonl", line=3)) == "a.jsonl:3: bad"
    assert str(DataError("bad", path="a.parquet", row=7)) == "a.parquet row 7: bad"


def test_unknown_names_list_the_known_ones():
    assert unknown_name("domain", "lw", ["law", "code"]) == (
        "unknown domain 'lw'; did you mean 'law'? (known: law, code)"
    )


def test_one_rank_agrees_with_itself():
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    assert distributed.all_equal(2**62 + 12345)


def test_collectives_take_cuda_tensors_under_nccl(monkeypatch):
    """NCCL knows no CPU tensors: a vote on the CPU would fail on every resume with several GPUs."""
    import torch.distributed as dist

    assert distributed.collective_device().type == "cpu"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(distributed.collective_device()) == "cuda:3"


AGREEMENT = """
import torch.distributed as dist
from versatune_ds.foundations import distributed as d
dist.init_process_group("gloo")
assert d.all_agree(True) and not d.all_agree(d.rank() != 2)
same = 0x7FFF_FFFF_FFFF_FFFF
assert d.all_equal(same)
for bit in range(63):
    assert not d.all_equal(same ^ (1 << bit) if d.rank() == 1 else same), bit
assert d.gather_objects(d.rank() * 10) == [0, 10, 20]
d.raise_together(None)
try:
    d.raise_together(ValueError("mine") if d.rank() == 1 else None)
except ValueError as error:
    assert str(error) == "mine"
else:
    raise AssertionError("nothing was raised")
def only_on_main(value):
    assert d.is_main()
    if value < 0:
        raise ValueError("of rank 0")
    return value
assert d.together(lambda: d.rank()) == d.rank() and d.on_main(only_on_main, 7) == 7
for fails in (lambda: d.on_main(only_on_main, -1), lambda: d.together(lambda: 1 // (d.rank() - 2))):
    try:
        fails()
    except (ValueError, ZeroDivisionError) as error:
        assert str(error) in ("of rank 0", "integer division or modulo by zero")
    else:
        raise AssertionError("nothing was raised")
dist.barrier(); dist.destroy_process_group()
"""


def test_ranks_see_every_difference(tmp_path):
    script = tmp_path / "agreement.py"
    script.write_text(AGREEMENT)
    launch_soundly(script, 3, [])


@pytest.mark.parametrize(
    "text",
    [
        "", " \n\t\u3000\u2028", "\x00\x1b\x85", "\u200b", "\u200c\u200d", "\u2060\ufeff", "\u00ad", "\u202e",
        "\u034f", "\u3164\u115f", "\ufe0f", "\u2800", "\U000e0041\U000e01ef",
    ],
)  # fmt: skip
def test_text_that_shows_nothing_is_blank(text):
    assert is_blank(text)


@pytest.mark.parametrize(
    "text", ["a", "\u200b.", "0", "\u4e2d", "\u0301", "\ue000", "\U0001fae0", "\U0001fbff"]
)
def test_text_that_shows_anything_is_not_blank(text):
    """Also a private character, and an emoji that this Python may not know."""
    assert not is_blank(text)


def test_numbers_of_a_table_stand_to_the_right():
    rows = [["domain", "samples", ""], ["law", "1,200", "reused"], ["other", "7", ""]]
    assert list(in_columns(rows)) == ["domain  samples", "law       1,200  reused", "other         7"]
