"""The kernel benchmark: its gate, its ratios by hand, and one small run from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from launching import REPOSITORY

FOLDER = REPOSITORY / "kernels" / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import torch  # noqa: E402
from loss_bench import candidates, gate, results  # noqa: E402
from loss_bench.cases import Case, plan_cases  # noqa: E402
from loss_bench.worker import make_inputs  # noqa: E402

TINY = Case("tiny", 32, 1031, 64, 0.5, "float32")


# --- what is measured ---------------------------------------------------------------------------------------


def test_a_star_varies_one_axis_at_a_time_and_equal_heads_are_measured_once():
    heads = ["qwen2.5-32b", "qwen2.5-14b", "llama-3-8b"]
    cases = plan_cases(heads, [1024, 8192], [1.0, 0.3], ["bfloat16"], sweep="star", sharpness=3.0)
    found = [(case.head, case.num_tokens, case.supervised) for case in cases]
    assert found == [
        ("qwen2.5-32b", 8192, 1.0),
        ("qwen2.5-32b", 1024, 1.0),
        ("qwen2.5-32b", 8192, 0.3),
        ("llama-3-8b", 8192, 1.0),
    ]
    full = plan_cases(heads, [1024, 8192], [1.0, 0.3], ["bfloat16"], sweep="full", sharpness=3.0)
    assert len(full) == 2 * 2 * 2


def test_inputs_have_exactly_the_labels_asked_for():
    inputs = make_inputs(TINY, torch.device("cpu"))
    assert int((inputs.labels != candidates.IGNORE_INDEX).sum()) == TINY.num_valid == 32
    assert TINY.useful_flops == 6 * 32 * 1031 * 32


# --- the gate -----------------------------------------------------------------------------------------------


def ours(inputs: candidates.Inputs) -> torch.Tensor:
    return candidates.ours(inputs, backend="chunked")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [ours, candidates.hf_eager])
def test_right_losses_pass_the_gate(loss, dtype):
    inputs = make_inputs(Case("tiny", 32, 1031, 64, 1.0, dtype), torch.device("cpu"))
    assert gate.Gate(inputs).judge(loss)["verdict"] == "passed"


class Negated(torch.autograd.Function):
    """Its gradient has the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


MUTANTS = {
    "negated": (lambda inputs: Negated.apply(ours(inputs)), "wrong"),
    "halved": (lambda inputs: 0.5 * ours(inputs), "wrong"),
    "1 % off": (lambda inputs: 1.01 * ours(inputs), "outside"),
    "weight has no gradient": (
        lambda inputs: candidates.hf_eager(
            candidates.Inputs(**{**inputs.__dict__, "weight": inputs.weight.detach()})
        ),
        "wrong",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_losses_do_not(name, dtype):
    mutant, verdict = MUTANTS[name]
    inputs = make_inputs(Case("tiny", 32, 1031, 64, 0.5, dtype), torch.device("cpu"))
    assert gate.Gate(inputs).judge(mutant)["verdict"] == verdict


def test_the_bound_is_twice_torchs_error():
    theirs = {"loss": 0.01, "dx": 0.02, "dw": 0.03}
    assert gate.judge({"loss": 0.02, "dx": 0.04, "dw": 0.06}, theirs) == "passed"
    assert gate.judge({"loss": 0.02, "dx": 0.0401, "dw": 0.06}, theirs) == "outside"
    assert gate.judge({"loss": 0.02, "dx": float("nan"), "dw": 0.06}, theirs) == "wrong"


# --- libraries of many versions -----------------------------------------------------------------------------


def test_options_are_passed_by_name_in_any_order():
    def forward(ctx, weight, _input, target, bias=None, accum_dtype=None):
        return None

    values = {"_input": 1, "weight": 2, "target": 3, "accum_dtype": 4}
    assert candidates._by_name(forward, values, skip=1) == [2, 1, 3, None, 4]
    with pytest.raises(candidates.NoSuchKnob, match="chunk_mem_const"):
        candidates._by_name(forward, {**values, "chunk_mem_const": 2}, skip=1)


def test_the_ceiling_needs_only_rows_with_labels():
    inputs = make_inputs(TINY, torch.device("cpu"))
    candidates.three_products(inputs)
    x, w = inputs.hidden.detach()[: TINY.num_valid], inputs.weight.detach()
    assert torch.allclose(inputs.weight.grad, (x @ w.T).T @ x)
    assert torch.allclose(inputs.hidden.grad[: TINY.num_valid], x @ w.T @ w)
    assert not inputs.hidden.grad[TINY.num_valid :].any()


def test_absent_libraries_are_said_to_be_absent():
    absent = candidates.Candidate("x", "no-such-package", "no_such_module", (), ours)
    assert absent.missing() == "not installed" and absent.version() is None


# --- numbers by hand ----------------------------------------------------------------------------------------


def entry(candidate: str, seconds: list[float], peak: int | None, **more) -> dict:
    cpu = [2 * s for s in seconds]
    return {
        "candidate": candidate, "variant": "default", "status": "ok", "gate": {"verdict": "passed"},
        "s": seconds, "cpu_s": cpu, "peak_bytes": [peak], "dx_bytes": 2**28, "dw_bytes": 2**28, **more,
    }  # fmt: skip


def test_ratios_by_hand():
    entries = [
        entry("three products", [1.0, 1.0, 1.0], 2**30),
        entry("hf eager", [2.0, 4.0, 3.0], 5 * 2**29),  # 2.5 GiB, 0.5 of it gradients
        entry("ours", [1.5], 2**30),  # 1 GiB, 0.5 of it gradients
        {"candidate": "rival", "variant": "default", "status": "out of memory", "reason": "too large"},
    ]
    case = {"useful_flops": 6e12}
    summary = results.summarise(case, entries, "cuda")
    ceiling, eager, ours, rival = summary["variants"]
    assert summary["clock"] == "wall_s"
    assert ceiling["useful_tflops"] == 6.0 and eager["useful_tflops"] == 2.0
    assert eager["wall_s"] == {"median": 3.0, "p20": 2.4, "p80": 3.6}
    assert ours["ratio_to_ceiling"] == 1.5
    assert eager["transient_gib"] == 2.0 and ours["transient_gib"] == 0.5
    assert ours["ratio_to_eager"] == {"time": 0.5, "wall": 0.5, "transient": 0.25, "peak": 0.4}
    assert rival["status"] == "out of memory" and "wall_s" not in rival


def test_on_a_cpu_the_clock_is_cpu_time():
    entries = [entry("hf eager", [1.0], None, cpu_s=[4.0]), entry("ours", [1.0], None, cpu_s=[1.0])]
    summary = results.summarise({"useful_flops": 1.0}, entries, "cpu")
    assert summary["variants"][1]["ratio_to_eager"] == {
        "time": 0.25, "wall": 1.0, "transient": None, "peak": None,
    }  # fmt: skip


def test_variants_that_were_too_slow_are_left_out_where_it_would_be_worse():
    def case(tokens: int, dtype: str = "float32") -> dict:
        return {
            "hidden_size": 8, "vocab_size": 100, "num_tokens": tokens, "supervised": 1.0, "dtype": dtype,
        }  # fmt: skip

    slow = {"candidate": "rival", "variant": "default", "wall_s": {"median": 61.0}}
    quick = {"candidate": "ours", "variant": "default", "wall_s": {"median": 59.0}}
    earlier = [{"case": case(512), "variants": [slow, quick, {"candidate": "x", "variant": "y"}]}]
    reason = {("rival", "default"): "61 s a run at N 512, 100%"}
    assert results.too_slow(earlier, case(512), 60.0) == reason
    assert results.too_slow(earlier, case(1024), 60.0) == reason
    assert results.too_slow(earlier, case(256), 60.0) == {}
    assert results.too_slow(earlier, case(1024, "bfloat16"), 60.0) == {}


# --- the command --------------------------------------------------------------------------------------------


def test_a_small_run_writes_json_table_and_picture(tmp_path):
    command = [
        sys.executable, str(FOLDER / "fused_loss.py"), "--device", "cpu", "--cpu-size", "tiny",
        "--dtype", "float32", "--candidates", "three products", "hf eager", "chunked", "liger",
        "--rounds", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["complete"] and document["kind"] == "fused_loss"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert document["missing"] == {"liger": "does not run on CPUs"}
    (case,) = document["cases"]
    found = {(v["candidate"], v["variant"]): v for v in case["variants"]}
    assert set(found) == {
        ("three products", "ceiling"), ("hf eager", "default"),
        ("chunked", "default"), ("chunked", "best chunk"),
    }  # fmt: skip
    for variant in found.values():
        assert variant["status"] == "ok" and variant["num_runs"] == 2
        assert variant["ratio_to_eager"]["time"] > 0
    assert found["chunked", "default"]["gate"]["verdict"] == "passed"
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "| chunked | best chunk | 64 |" in (tmp_path / "table.md").read_text()
    assert "| chunked | default |" in done.stdout
    again = subprocess.run(
        [*command, "--resume", "--tokens", "64", "16"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-3000:]
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert cases[0] == case and [c["case"]["num_tokens"] for c in cases] == [64, 16]


ONE_TURN = """
import json, sys, torch
from loss_bench.candidates import CANDIDATES
from loss_bench.worker import Worker
worker = Worker(CANDIDATES[sys.argv[1]], torch.device("cpu"))
worker.answer({"do": "prepare", "case": json.loads(sys.argv[2])})
worker.chunks = {"default": None}
print(json.dumps(worker.answer({"do": "turn", "variant": "default", "warmups": 1, "runs": 1})))
"""


@pytest.mark.slow
def test_the_chunked_loss_takes_a_quarter_of_eagers_transient_memory():
    """At the vocabulary of Qwen2.5; each in a process of its own, measured as the benchmark does."""
    case = json.dumps(asdict(Case("small", 256, 152_064, 512, 1.0, "float32")))
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    transient = {}
    for name in ("hf eager", "chunked"):
        done = subprocess.run(
            [sys.executable, "-c", ONE_TURN, name, case],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        turn = json.loads(done.stdout)
        transient[name] = turn["peak_bytes"] - turn["dx_bytes"] - turn["dw_bytes"]
    assert 0 < transient["chunked"] <= 0.25 * transient["hf eager"], transient


def test_real_hidden_states_come_from_a_file(tmp_path):
    from safetensors.torch import save_file

    states = {
        "hidden": torch.randn(40, 16, dtype=torch.bfloat16),
        "weight": torch.randn(50, 16, dtype=torch.bfloat16),
        "labels": torch.arange(40),
    }
    save_file(states, tmp_path / "states.safetensors")
    case = Case("states", 16, 50, 32, 1.0, "float32", states=str(tmp_path / "states.safetensors"))
    inputs = make_inputs(case, torch.device("cpu"))
    assert torch.equal(inputs.hidden, states["hidden"][:32].float())
    assert torch.equal(inputs.weight, states["weight"].float())
    too_many = Case("states", 16, 50, 41, 1.0, "float32", states=case.states)
    with pytest.raises(ValueError, match="41 rows"):
        make_inputs(too_many, torch.device("cpu"))
