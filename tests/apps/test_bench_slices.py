"""Slices of the trainer benchmark: what is chosen for a device, and that a lost slice costs no other.

The processes of slices are stand-ins here; `test_bench.py` has real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from versatune_ds.apps import programs
from versatune_ds.apps.bench import fit, slices
from versatune_ds.apps.bench import results as bench_results
from versatune_ds.apps.bench import trainer as bench
from versatune_ds.apps.bench.fit import DeviceMemory, Slice, choose_slices
from versatune_ds.apps.bench.samples import random_samples
from versatune_ds.apps.bench.settings import ZERO_FILE, BenchSettings, bench_config, check_settings
from versatune_ds.apps.plan.setup import GIB
from versatune_ds.cli.main import main
from versatune_ds.foundations.errors import ConfigError, PeerLostError

H100, H200 = (DeviceMemory(int(gib * GIB), is_cuda=True) for gib in (79.2, 139.8))  # as the driver says


# --- what is chosen -----------------------------------------------------------------------------------------


def chosen(shape: str, memory: DeviceMemory, **settings) -> list[tuple[int, object, str]]:
    slices = choose_slices(BenchSettings(shape=shape, **settings), memory)
    assert all(part.peak_bytes <= memory.bytes for part in slices if part.verdict == "fits")
    return [(part.layers, part.checkpointing, part.verdict) for part in slices]


def test_a_whole_model_that_fits_is_measured_with_as_little_recomputation_as_fits():
    assert chosen("llama-3-8b", H200) == [(32, "all", "fits")]
    assert chosen("llama-3-8b", H200, pack_len=2048) == [(32, 2, "fits")]
    assert chosen("tiny", H100) == [(4, "off", "fits")]


def test_a_model_that_does_not_fit_is_cut_into_the_largest_slices_that_do():
    (half, one, _), (most, other, verdict) = chosen("llama-3-8b", H100)
    assert half == most // 2 and one == other == "all" and verdict == "fits"
    assert chosen("llama-3-8b", H100, layers=(most + 1,))[0][2] != "fits"


def test_slices_that_cannot_fit_are_refused_with_numbers_and_a_cure():
    settings = BenchSettings(shape="qwen2.5-32b", layers=(4, 8))
    small, large = choose_slices(settings, H100)
    assert (small.verdict, large.verdict) == ("fits", "does not fit")
    assert large.peak_bytes > 80 * GIB and "of 79.2 GiB on each rank" in str(large)
    assert large.cure.startswith("at most --layers 5 fit (with --checkpointing all)")
    assert not small.cure
    (nothing,) = choose_slices(BenchSettings(shape="qwen2.5-32b"), DeviceMemory(8 * GIB, is_cuda=True))
    assert nothing.verdict == "does not fit" and "zero3_offload.json" in nothing.cure


def test_all_slices_recompute_alike_and_no_part_of_the_layers():
    assert [c[1] for c in chosen("qwen2.5-14b", H100, layers=(2, 8))] == ["all", "all"]
    assert [c[1] for c in chosen("qwen2.5-14b", H200, layers=(2, 8))] == ["off", "off"]
    asked = chosen("qwen2.5-14b", H200, layers=(2, 8), activation_checkpointing=2)
    assert [c[1] for c in asked] == [2, 2]


def test_what_fits_with_its_tensors_only_is_tried():
    settings = BenchSettings(shape="llama-3-8b", layers=(32,))
    (planned,) = choose_slices(settings, H200)
    (tight,) = choose_slices(settings, DeviceMemory(planned.peak_bytes - GIB, is_cuda=True))
    assert (tight.verdict, tight.cure) == ("tight", "")


def test_the_settings_are_those_of_a_run_and_not_deepspeeds_own():
    settings = BenchSettings(shape="tiny", activation_checkpointing="all", overrides=("batch.pack_len=64",))
    config = bench_config(settings, "model", ZERO_FILE)
    assert config.deepspeed == json.loads(ZERO_FILE.read_text())
    assert (config.batch.packs_per_step, config.batch.pack_len) == (8, 64)
    lower = bench_config(
        BenchSettings(shape="tiny", zero_stage=1, activation_checkpointing=2), "m", ZERO_FILE
    )
    section = lower.deepspeed["zero_optimization"]
    assert section["stage"] == 1 and not [key for key in section if key.startswith("stage3_")]


def test_eight_packs_a_step_leave_almost_no_padding():
    from versatune_ds.data.plan.planner import Corpus, PlannerState, plan_step
    from versatune_ds.domain.table import DomainTable
    from versatune_ds.engine.prepared import planner_settings

    settings = BenchSettings(shape="tiny", activation_checkpointing="off")
    config = bench_config(settings, "model", ZERO_FILE)
    table = DomainTable(config.domains.names)
    sources = [random_samples(i, 4096, 8192, 0.5) for i in range(len(table))]
    corpus, planner = Corpus.from_caches(sources, table.names), planner_settings(config, table)
    state, real, slot = PlannerState.initial(len(table)), 0, 0
    for _ in range(20):
        plan = plan_step(corpus, planner, state, [1 / len(table)] * len(table))
        state, real, slot = plan.state_after, real + plan.tokens, slot + plan.num_packs * plan.pack_len
    assert real / slot > 0.995


def test_an_override_of_the_recomputation_is_refused():
    settings = BenchSettings(shape="tiny", overrides=("model.activation_checkpointing=all",))
    with pytest.raises(ConfigError, match="give --checkpointing instead"):
        check_settings(settings)


# --- processes ----------------------------------------------------------------------------------------------

MEASURED = {
    "slice": {
        "layers": 1,
        "status": "measured",
        **dict.fromkeys((f"{unit}_tokens_per_s_per_rank" for unit in bench_results.UNITS), 1.0),
        **dict.fromkeys(("achieved_tflops_per_rank", "mfu", "mfu_6n", "ratio_to_matmul_ceiling"), 0.5),
        "step_s": dict.fromkeys(("mean", "median", "p95"), 1.0),
        "split_s": dict.fromkeys(bench_results.PHASES, 0.1),
        "tokens_per_step": dict.fromkeys((*bench_results.UNITS, "sum_squared_lengths"), 5),
        "num_parameters": 9,
        "peak_memory_gib": 1.0,
        "statistics_off": None,
        "weight_update": {"update_s": 1, "share_of_steps": 1, "every_n_steps": 1, "data_wait_after_s": 1},
        "matmul_ceiling": {"tflops": 1.0},
    },
    "settings": {"attention": "x", "loss_backend": "y"},
    "environment": {"device": "CPU", "commit": "c", "versions": {}},
    "peak_tflops": None,
}  # fmt: skip

STAND_IN = """
import json, os, signal, sys, time
layers = json.load(open(sys.argv[1]))["layers"]
if layers == 1:
    open(sys.argv[2], "w").write(os.environ["MEASURED"])
elif layers == 2:
    written = json.load(open(os.environ["RESULT"]))  # what the first slice left
    assert [s["status"] for s in written["slices"]] == ["measured"] and not written["finished"]
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
elif layers == 3:
    os.kill(os.getpid(), signal.SIGKILL)
else:
    time.sleep(600)
"""


def test_a_lost_slice_costs_no_other_its_numbers(tmp_path, monkeypatch, capsys):
    """One measured, one out of memory, one killed, one too slow: each is written as soon as it is over."""
    monkeypatch.setattr(slices, "COMMAND", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(fit, "device_memory", lambda: DeviceMemory(64 * GIB, is_cuda=True))
    monkeypatch.setenv("MEASURED", json.dumps(MEASURED))
    monkeypatch.setenv("RESULT", str(tmp_path / "four.json"))
    options = ["--shape", "tiny", "--layers", "4,1,3,2", "--out", str(tmp_path), "--name", "four"]
    assert main(["bench", *options, "--slice-limit-s", "5"]) == 1
    result = json.loads((tmp_path / "four.json").read_text())
    assert result["finished"] and result["full_model"]["step_s"] > 0
    first, memory, killed, slow = result["slices"]
    assert (first["layers"], first["status"]) == (1, "measured")
    assert memory["status"] == "out of memory" and "Tried to allocate 2 GiB" in memory["reason"]
    assert killed["status"] == "failed" and "SIGKILL" in killed["reason"]
    assert slow["status"] == "time limit" and "5 s" in slow["reason"]
    assert "- 2 layers: out of memory: " in (tmp_path / "four.md").read_text()
    assert "- 4 layers: time limit: " in capsys.readouterr().out


def test_a_slice_that_does_not_fit_is_never_started(monkeypatch):
    monkeypatch.setattr(slices, "COMMAND", ("/nonexistent",))
    seen = []
    too_large = Slice(4, "all", "does not fit", 90 * GIB, 80 * GIB, "at most --layers 2 fit")
    slices.run_slices(BenchSettings(shape="tiny"), [too_large], None, lambda all_: seen.extend(all_))
    assert seen[0]["slice"]["status"] == "does not fit"
    assert "90.0 of 80.0 GiB" in seen[0]["slice"]["reason"] and "--layers 2" in seen[0]["slice"]["reason"]
    assert seen[0]["slice"]["plan"] == {"verdict": "does not fit", "peak_gib": 90.0, "device_gib": 80.0}


def test_nothing_measured_is_a_result_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "device_memory", lambda: DeviceMemory(GIB, is_cuda=True))
    assert main(["bench", "--shape", "llama-3-8b", "--out", str(tmp_path), "--name", "none"]) == 1
    result = json.loads((tmp_path / "none.json").read_text())
    assert result["full_model"] is None and result["slices"][0]["status"] == "does not fit"
    assert "nothing measured" in (tmp_path / "none.md").read_text()
    assert main(["bench", "--page", str(tmp_path)]) == 0
    assert "- none: 32 layers: does not fit" in (tmp_path / "comparison.md").read_text()


def test_a_slice_tells_what_became_of_it(tmp_path, monkeypatch):
    """The process of a slice: numbers, or out of memory, also where another error is its consequence."""
    job, answer = tmp_path / "job.json", tmp_path / "outcome.json"
    job.write_text(json.dumps({"settings": {"shape": "tiny"}, "layers": 3, "starter": os.getppid()}))
    monkeypatch.setattr(slices, "setup_logging", lambda: None)

    def run(made: BaseException | dict) -> tuple[int, dict]:
        def slice_(settings, layers):
            assert (settings, layers) == (BenchSettings(shape="tiny"), 3)
            if isinstance(made, BaseException):
                raise made
            return made

        monkeypatch.setattr(bench, "bench_slice", slice_)
        code = slices.main([str(job), str(answer)])
        return code, json.loads(answer.read_text())["slice"]

    rehearsal = ConfigError("the pack is too long")
    rehearsal.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    other_rank = PeerLostError("rank 3 failed: OutOfMemoryError: CUDA out of memory", (3,), 1)
    assert run({"slice": {"layers": 3}}) == (0, {"layers": 3, "status": "measured"})
    assert run(torch.OutOfMemoryError("no room"))[1]["status"] == "out of memory"
    assert run(rehearsal) == (1, {"status": "out of memory", "reason": "the pack is too long"})
    assert run(other_rank)[1]["status"] == "out of memory"
    assert run(ValueError("bad")) == (1, {"status": "failed", "reason": "ValueError: bad"})


def test_a_slice_ends_with_the_process_that_started_it(tmp_path):
    """However that ends: nobody would free the accelerator."""
    watch = "import sys; from versatune_ds.apps.bench import slices; slices._leave_with(int(sys.argv[1]))"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, watch], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 120
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_terminated_benchmark_takes_its_slice_along(monkeypatch):
    monkeypatch.setattr(slices, "COMMAND", (sys.executable, "-c", STAND_IN))
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(programs.subprocess, "Popen", start)
    endless = Slice(4, "off", "fits", GIB, 2 * GIB)
    with pytest.raises(SystemExit):
        slices.run_slices(BenchSettings(shape="tiny"), [endless], None, lambda all_: None)
    assert started[0].poll() is not None


def test_ranks_of_a_slice_meet_on_a_port_of_their_own(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    found = [slices.own_port(index) for index in range(2)]
    assert [environment["MASTER_PORT"] for environment in found] == ["29501", "29502"]
    assert {environment["TORCHELASTIC_USE_AGENT_STORE"] for environment in found} == {"False"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_out_of_memory_on_a_gpu_is_recorded_as_such(tmp_path, monkeypatch):
    """24 layers of 32B hold about 200 GiB: more than any one GPU, had the memory model let them through."""
    monkeypatch.setattr(fit, "device_memory", lambda: DeviceMemory(10**13, is_cuda=True))
    options = ["--shape", "qwen2.5-32b", "--layers", "24", "--out", str(tmp_path), "--name", "oom"]
    assert main(["bench", *options]) == 1
    (lost,) = json.loads((tmp_path / "oom.json").read_text())["slices"]
    assert lost["status"] == "out of memory", lost["reason"]
