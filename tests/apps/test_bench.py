"""The trainer benchmark: what it writes, what it adds up to, and that timing changes nothing.

No test asserts a time; the numbers of a run are only compared with each other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from launching import REPOSITORY, launch

from versatune_ds.apps.bench import results as bench_results
from versatune_ds.apps.bench import shapes as bench_shapes
from versatune_ds.cli.main import main
from versatune_ds.engine.model.families import planned_shape
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations.errors import ConfigError, DataError

OPTIONS = (
    "--shape", "tiny", "--pack-len", "128", "--packs-per-rank", "1", "--dtype", "fp32",
    "--warmup-steps", "1", "--steps", "2", "--split-steps", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """Two slices of the tiny shape on two ranks, with everything measured."""
    out = tmp_path_factory.mktemp("bench")
    arguments = [*OPTIONS, "--layers", "1,2", "--out", str(out), "--name", "two", "train.rehearse=on"]
    ranks = launch(REPOSITORY / "launch" / "bench.py", 2, arguments)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stdout[-3000:] + ranks[1].stdout[-3000:]
    assert (out / "two.md").read_text().startswith("# Trainer benchmark: tiny")
    return {**json.loads((out / "two.json").read_text()), "log": ranks[0].stdout}


def tiny_parameters(layers: int) -> int:
    return planned_shape(bench_shapes.shape_config("tiny", layers), "tiny").parameters


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "nonembedding"),
    [
        # as the model cards say (Qwen gives both, Llama the total)
        ("qwen2.5-7b", 7.61, 6.53),
        ("qwen2.5-14b", 14.7, 13.1),
        ("qwen2.5-32b", 32.5, 31.0),
        ("qwen2-7b", 7.61, 6.53),
        ("llama-2-7b", 6.74, None),
        ("llama-2-13b", 13.02, None),
        ("llama-3-8b", 8.03, None),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, billions, nonembedding):
    assert bench_shapes.find_shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.01)
    if nonembedding is not None:
        assert bench_shapes.find_shape(name).nonembedding_parameters / 1e9 == pytest.approx(
            nonembedding, rel=0.01
        )


def test_wrong_shapes_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown shape 'qwen2.5-23b'; did you mean 'qwen2.5-32b'"):
        bench_shapes.shape_config("qwen2.5-23b")
    with pytest.raises(ConfigError, match="tiny has 4 layers"):
        bench_shapes.shape_config("tiny", 5)


def test_the_kernel_benchmark_has_the_same_heads():
    code = (
        "import sys; sys.path.insert(0, 'kernels/benchmarks')\n"
        "import json; from loss_bench.cases import HEADS; print(json.dumps(HEADS))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    heads = json.loads(out.stdout)
    shared = set(heads) & set(bench_shapes.SHAPES) - {"tiny"}
    assert len(shared) == 5
    for name in shared:
        shape = bench_shapes.shape_config(name)
        assert heads[name] == [shape["hidden_size"], shape["vocab_size"]]


# --- arithmetic by hand -------------------------------------------------------------------------------------


def test_rates_by_hand():
    # 800 real tokens in 2 s on 4 ranks: 100 a second and rank; 1.6e13 FLOPs: 2 TFLOP/s a rank
    tokens = {"real": 800, "slot": 1600, "supervised": 400}
    done = bench_results.Work(flops=1.6e13, flops_6n=2.4e13)
    rates = bench_results.rates(tokens, done, 2.0, 4, peak_tflops=10.0, ceiling_tflops=8.0)
    assert rates == {
        "real_tokens_per_s_per_rank": 100.0,
        "slot_tokens_per_s_per_rank": 200.0,
        "supervised_tokens_per_s_per_rank": 50.0,
        "achieved_tflops_per_rank": 2.0,
        "mfu": 0.2,
        "mfu_6n": 0.3,
        "ratio_to_matmul_ceiling": 0.25,
    }


def slice_of(layers: int, step_s: float, **split_s: float) -> dict:
    return {
        "layers": layers,
        "status": "measured",
        "num_parameters": 1400,
        "step_s": {"mean": step_s},
        "split_s": {**dict.fromkeys(bench_results.PHASES, 0.0), **split_s},
        "tokens_per_step": {"real": 10, "slot": 20, "supervised": 5, "sum_squared_lengths": 30},
    }


SHAPE = ModelShape(
    family="none", hidden=4, mlp=8, layers=2, heads=2, kv_heads=2, head_size=4, vocab=50, tied=False,
    vectors=(),
)  # fmt: skip


def test_two_slices_are_extrapolated_on_a_line():
    # 0.2 s fixed and 0.1 s a layer: 4 layers 0.6, 8 layers 1.0, 64 layers 6.6
    step_s, method = bench_results.extrapolated_step_s([slice_of(8, 1.0), slice_of(4, 0.6)], 64, 9.0)
    assert step_s == pytest.approx(6.6)
    assert "4 and 8" in method


def test_one_slice_is_extrapolated_by_phase():
    # of 1.0 s: 0.6 in the layers (x 8), 0.1 optimizer (x 5), 0.3 head and rest: 4.8 + 0.5 + 0.3
    measured = slice_of(8, 1.0, forward=0.2, backward=0.4, optimizer=0.1, loss=0.2, other=0.1)
    step_s, _ = bench_results.extrapolated_step_s([measured], 64, 5.0)
    assert step_s == pytest.approx(5.6)


def test_a_whole_model_is_not_extrapolated():
    assert bench_results.extrapolated_step_s([slice_of(4, 0.6), slice_of(8, 1.0)], 8, 1.0) == (
        1.0,
        "measured",
    )


def test_the_full_model_is_counted_with_all_its_layers():
    shape = dataclasses.replace(SHAPE, layers=64, counted=(1400, 1000))
    full = bench_results.full_model(
        [slice_of(8, 1.0), slice_of(4, 0.6)], shape, 20, 1, peak_tflops=1e-6, ceiling_tflops=None
    )
    # 6 x 1000 x 10 + 6 x 4 x 50 x 5 + 6 x 64 x 8 x 30 = 158,160 FLOPs in 6.6 s
    assert full["achieved_tflops_per_rank"] == pytest.approx(158_160 / 6.6 / 1e12)
    assert full["mfu"] == pytest.approx(158_160 / 6.6 / 1e6)
    # (6 x 1400 + 12 x 64 x 8 x 20) x 20 slots = 131,280 x 20
    assert full["mfu_6n"] == pytest.approx(2_625_600 / 6.6 / 1e6)
    assert full["extrapolated"]


def test_one_slice_of_a_full_model_scales_the_optimizer_by_the_parameters():
    # 1 of 2 layers, half of the 2,800 parameters, all of the second in the optimizer: 2 s
    shape = dataclasses.replace(SHAPE, layers=2, counted=(2800, 1000))
    full = bench_results.full_model(
        [slice_of(1, 1.0, optimizer=1.0)], shape, 20, 1, peak_tflops=None, ceiling_tflops=None
    )
    assert full["step_s"] == pytest.approx(2.0) and full["mfu"] is full["mfu_6n"] is None


# --- a run --------------------------------------------------------------------------------------------------


def test_a_result_says_what_was_measured(result):
    assert result["kind"] == bench_results.KIND
    assert result["environment"]["world_size"] == 2
    assert result["command"].startswith("bench.py --shape tiny --pack-len 128")
    assert result["settings"]["zero_stage"] == 3 and result["settings"]["data"] == "synthetic"
    assert [measured["layers"] for measured in result["slices"]] == [1, 2]
    assert result["full_model"]["layers"] == 4 and result["full_model"]["extrapolated"]
    assert result["matmul_ceiling"]["tflops"] > 0
    assert result["finished"] and result["settings"]["activation_checkpointing"] == "off"
    for measured in result["slices"]:
        expected = tiny_parameters(measured["layers"])
        assert measured["num_parameters"] == expected
        assert measured["skipped_steps"] == 0
        assert measured["peak_memory_gib"] > 0
        assert measured["status"] == "measured" and measured["plan"]["verdict"] == "fits"
        assert measured["mfu"] is measured["mfu_6n"] is None  # the peak of a CPU is not known


def test_a_slice_rehearses_as_a_run_does(result):
    assert result["log"].count("rehearsal: a full pack fits") == 2


def test_the_shipped_deepspeed_settings_are_measured(result):
    shipped = json.loads((REPOSITORY / "configs" / "deepspeed" / "zero3.json").read_text())
    assert shipped["zero_optimization"].items() <= result["settings"]["zero_optimization"].items()


@pytest.mark.slow
def test_a_rank_without_memory_costs_its_slice_only(tmp_path):
    """Rank 1 runs out of memory in the first slice: rank 0 knows why, and both go on with the second."""
    script = REPOSITORY / "tests" / "support" / "sabotaged_bench.py"
    arguments = [*OPTIONS, "--layers", "1,2", "--metrics", "off", "--out", str(tmp_path), "--name", "two"]
    ranks = launch(script, 2, arguments)
    lost, measured = json.loads((tmp_path / "two.json").read_text())["slices"]
    assert lost["status"] == "out of memory" and "Tried to allocate 2 GiB" in lost["reason"], lost
    assert "rank 1" in lost["reason"] and measured["status"] == "measured"
    assert [rank.returncode for rank in ranks] == [1, 0]


def test_tokens_and_rates_belong_together(result):
    for measured in result["slices"]:
        tokens = measured["tokens_per_step"]
        assert tokens["slot"] == 2 * 128 >= tokens["real"] > tokens["supervised"] > 0
        for unit in bench_results.UNITS:
            rate = tokens[unit] * measured["steps"] / measured["seconds"] / 2
            assert measured[f"{unit}_tokens_per_s_per_rank"] == pytest.approx(rate)


def test_every_phase_is_seen(result):
    for measured in result["slices"]:
        assert set(measured["split_s"]) == set(bench_results.PHASES)
        assert all(measured["split_s"][name] > 0 for name in bench_results.PHASES if name != "other")
        assert measured["weight_update"]["update_s"] > 0
        assert math.isfinite(measured["statistics_off"]["ratio"])


def test_phases_add_up_to_the_step():
    from versatune_ds.apps.bench.phases import split
    from versatune_ds.engine import phases

    own = {phases.FORWARD: 2.0, phases.LOSS: 1.0, phases.BACKWARD: 4.0, phases.OPTIMIZER_STEP: 1.0}
    own |= {phases.STATISTICS: 0.25, phases.REDUCTION: 0.25, phases.DATA_WAIT: 0.25, "evaluation": 99.0}
    parts = split(10.0, own)
    assert parts["forward"] == 2.0 and parts["data_wait"] == 0.25 and parts["statistics"] == 0.5
    assert parts["other"] == 10.0 - 8.75
    assert sum(parts.values()) == 10.0


def test_the_page_compares_and_marks_what_was_extrapolated(result, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(result))
    whole = {**result, "full_model": {**result["full_model"], "extrapolated": False}}
    (tmp_path / "two.json").write_text(json.dumps(whole))
    (tmp_path / "failures.txt").write_text("qwen2.5-32b all layers\n")
    assert main(["bench", "--page", str(tmp_path)]) == 0
    lost = {"layers": 3, "status": "out of memory", "reason": "no room"}
    (tmp_path / "three.json").write_text(
        json.dumps({**result, "slices": [lost], "full_model": None, "environment": {}})
    )
    assert main(["bench", "--page", str(tmp_path)]) == 0
    page = (tmp_path / "comparison.md").read_text()
    assert "- three: 3 layers: out of memory: no room\n- qwen2.5-32b all layers\n" in page
    assert "MFU 6N: 6 N + 12 L H T" in page
    (one,) = [line for line in page.splitlines() if line.startswith("| one |")]
    (two,) = [line for line in page.splitlines() if line.startswith("| two |")]
    assert "4 * from 2" in one and "*" not in two


def test_a_page_without_results_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no result"):
        bench_results.read_results(tmp_path)
    (tmp_path / "old.json").write_text(json.dumps({"kind": bench_results.KIND, "schema_version": 0}))
    with pytest.raises(DataError, match="schema_version 0"):
        bench_results.read_results(tmp_path)


def test_being_timed_leaves_the_run_as_it_was():
    """Losses with phases timed and without are the same; without statistics the loss is, and no sums come."""
    code = """
import json, tempfile
from pathlib import Path
from versatune_ds.apps.bench import trainer as bench
from versatune_ds.apps.bench import phases as bench_phases
from versatune_ds.engine import train
from versatune_ds.apps.bench.settings import BenchSettings
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.phases import recording

device = start_process_group()
losses = {}
for how in ("plain", "timed", "without"):
    settings = BenchSettings(
        shape="tiny", pack_len=128, packs_per_rank=2, dtype="fp32", activation_checkpointing="off",
        overrides=("metrics.peak_tflops=2",),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = bench.write_model_folder(Path(folder) / "model", "tiny", 1)
        config = bench.bench_config(settings, str(model), Path(folder) / "run")
        run = bench.open_bench_run(config, settings, device)
    stepper, seen = bench.Stepper(run), []
    accumulate = train.accumulate
    backend, statistics = run.backend, run.statistics
    original = backend.live.backward
    backend.live.backward = lambda loss, **k: (seen.append(float(loss)), original(loss, **k))[1]
    if how == "timed":
        with recording(bench_phases.SplitRecorder(bench_phases.clock_of(device))) as recorder:
            stepper.take(2)
        parts = bench_phases.split(10.0, recorder.own_seconds())
        assert all(parts[name] > 0 for name in bench_phases.PHASES), parts
        assert abs(sum(parts.values()) - 10) < 1e-9
    elif how == "without":
        with bench_phases.without_statistics(run) as stepper.run:
            stepper.take(2)
    else:
        stepper.take(2)
    assert run.backend is backend and run.statistics is statistics
    records = run.sinks.records
    losses[how] = {"backward": seen, "record": [record.loss for record in records]}
    losses[how]["flops_6n"] = [record.mfu_6n * record.step_s * 2e12 for record in records]
    losses[how]["ratio"] = [record.mfu / record.mfu_6n for record in records]
    run.close()
    backend.close()
close_process_group()
print(json.dumps(losses))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    losses = json.loads(out.stdout.splitlines()[-1])
    assert losses["plain"]["record"] == losses["timed"]["record"]
    assert losses["plain"]["backward"] == losses["timed"]["backward"] == losses["without"]["backward"]
    assert all(loss > 0 for loss in losses["plain"]["record"])
    assert losses["without"]["record"] == [None, None]
    # (6 x all parameters + 12 x 1 layer x 64 x 128) x 256 slots, in every record
    expected = (6 * tiny_parameters(1) + 12 * 64 * 128) * 256
    assert losses["plain"]["flops_6n"] == pytest.approx([expected] * 2)
    assert all(0 < ratio < 0.6 for ratio in losses["plain"]["ratio"])  # half of the labels, no embedding


def test_prepared_data_must_fit_the_vocabulary():
    import numpy as np

    from versatune_ds.apps.bench.settings import BenchSettings
    from versatune_ds.apps.bench.trainer import check_tokens

    class Cache:
        domain = "law"

        def __len__(self):
            return 2

        def sample(self, i):
            return np.array([5, 511 + i], np.uint32), None

    settings = BenchSettings(shape="tiny")
    check_tokens([Cache(), None], 513, settings)
    with pytest.raises(DataError, match="token id 512, tiny has 512 tokens"):
        check_tokens([Cache()], 512, settings)
