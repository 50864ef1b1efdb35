"""What the machine is asked: each trap is found, and nothing where there is none."""

from __future__ import annotations

import importlib.machinery
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from versatune_ds.apps import host_checks
from versatune_ds.foundations.errors import ConfigError


def program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """A folder in front of the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(("cuda", "said"), [(None, "is built for CPUs"), ("12.8", "finds no GPU")])
def test_a_driver_that_torch_cannot_use_is_a_problem(bin_folder, monkeypatch, cuda, said):
    program(bin_folder, "nvidia-smi", "echo '570.86.10, NVIDIA H100'; echo '570.86.10, NVIDIA H100'")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (driver,) = [finding for finding in host_checks.system() if finding.topic == "driver"]
    assert driver.is_problem and said in driver.text and driver.text.startswith("570.86.10, NVIDIA H100,")


def test_a_driver_that_does_not_answer_costs_no_other_answer(bin_folder, monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, 60)

    program(bin_folder, "nvidia-smi", "true")
    monkeypatch.setattr(host_checks.subprocess, "run", hang)
    assert any("timed out after 60 seconds" in finding.text for finding in host_checks.system())


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"--hostfile .*hosts cannot be read"):
        host_checks.hosts_of(tmp_path / "hosts")


def test_a_machine_without_driver_is_fine(bin_folder, monkeypatch):
    monkeypatch.setattr(host_checks.shutil, "which", lambda name: None)
    assert not any(finding.is_problem for finding in host_checks.system())


def test_a_flash_attn_of_another_torch_is_a_problem(tmp_path, monkeypatch):
    assert not host_checks.flash_attention().is_problem  # not installed here
    spec = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(host_checks.importlib.util, "find_spec", lambda name: spec)
    library = tmp_path / "flash_attn_2_cuda.py"
    library.write_text("raise ImportError('undefined symbol: _ZN3c104impl3cow')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = host_checks.flash_attention()
    assert (
        finding.is_problem and "_ZN3c104impl3cow" in finding.text and "--no-build-isolation" in finding.text
    )
    library.write_text("")
    importlib.invalidate_caches()
    assert not host_checks.flash_attention().is_problem
    sys.modules.pop("flash_attn_2_cuda", None)


def test_limits(tmp_path, monkeypatch):
    given = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda kind: (given[kind], -1))
    monkeypatch.setattr(host_checks, "INFINIBAND", tmp_path / "none")
    assert [finding.is_problem for finding in host_checks.limits()] == [True, False]
    monkeypatch.setattr(host_checks, "INFINIBAND", tmp_path)
    assert [finding.is_problem for finding in host_checks.limits()] == [True, True]
    given.update(dict.fromkeys(given, resource.RLIM_INFINITY))
    assert [finding.is_problem for finding in host_checks.limits()] == [False, False]


def test_small_shared_memory_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks, "LEAST_SHARED_GIB", 0)
    assert not host_checks.shared_memory_size(tmp_path).is_problem
    monkeypatch.setattr(host_checks, "LEAST_SHARED_GIB", 1e9)
    assert "--ipc=host" in host_checks.shared_memory_size(tmp_path).text


def test_disk_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(host_checks, "SPEED_MB", 1)
    monkeypatch.setattr(host_checks, "LEAST_MB_S", 0)
    speed, clock = host_checks.disk_speed(tmp_path)
    assert not speed.is_problem and not clock.is_problem and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(host_checks, "LEAST_MB_S", 1e9)
    assert "1B parameters takes" in host_checks.disk_speed(tmp_path)[0].text
    assert "cannot be written" in host_checks.disk_speed(tmp_path / "none")[0].text


def test_clocks_of_hosts(bin_folder):
    """The stand-in for ssh gets its options, then host and command."""
    answers = 'far) echo "$(($(date +%s) - 90)).5";; near) shift 5; "$@";; *) echo no route >&2; exit 255;;'
    program(bin_folder, "ssh", f'case "$5" in {answers} esac')
    hostfile = bin_folder / "hosts"
    hostfile.write_text("# nodes\nnear slots=8\n\nfar slots=8\ngone slots=8\n")
    assert host_checks.hosts_of(hostfile) == ["near", "far", "gone"]
    near, far, gone = host_checks.clocks(host_checks.hosts_of(hostfile))
    assert not near.is_problem and "near: " in near.text
    assert far.is_problem and ("-90." in far.text or "-89." in far.text)
    assert gone.is_problem and "no route" in gone.text
