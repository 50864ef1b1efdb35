"""The doctor finds the traps it promises to find, and nothing where there is none."""

from __future__ import annotations

import mmap
import sys

import pytest

from versatune_ds.apps import doctor, host_checks
from versatune_ds.cli.main import main


def test_a_stale_lock_is_a_problem(tmp_path):
    assert not doctor.jit_locks(tmp_path)[0].is_problem
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.touch()
    (finding,) = doctor.jit_locks(tmp_path)
    assert finding.is_problem and str(lock) in finding.text and "delete" in finding.text


def test_shared_memory_in_use_is_no_leftover(tmp_path):
    buffer = tmp_path / "deepspeed_allreduce_buffer_0_1"
    buffer.write_bytes(b"x" * 4096)
    assert doctor.leftover_shared_memory(tmp_path)[0].is_problem
    with open(buffer, "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert not doctor.leftover_shared_memory(tmp_path)[0].is_problem


def test_a_package_of_ours_named_kernels_is_a_problem(tmp_path, monkeypatch):
    assert not doctor.kernels_import().is_problem
    (tmp_path / "kernels" / "versatune_kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "kernels", raising=False)  # transformers may have looked it up before
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.kernels_import().is_problem


def test_low_disk_is_a_problem(tmp_path, monkeypatch):
    assert str(tmp_path) in doctor.disk(tmp_path).text
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 1e9)
    assert doctor.disk(tmp_path).is_problem


@pytest.mark.parametrize("trap", [False, True])
def test_the_verb_prints_choices_and_leaves_with_1_on_problems(trap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 0)
    monkeypatch.setattr(host_checks, "SPEED_MB", 1)
    monkeypatch.setattr(host_checks, "LEAST_MB_S", 0)
    monkeypatch.setattr(host_checks, "LEAST_SHARED_GIB", 0)
    monkeypatch.setattr(host_checks, "LEAST_FILES", 0)
    if trap:
        (tmp_path / "extensions").mkdir()
        (tmp_path / "extensions" / "lock").touch()
    assert main(["doctor", str(tmp_path / "not" / "yet" / "there")]) == int(trap)
    out = capsys.readouterr().out
    for word in ("deepspeed", "attention", "sdpa", "loss", "chunked", "accelerator", "NCCL", "clock"):
        assert word in out
    assert ("!!" in out) == trap
