"""The kernel benchmark: its gate, its ratios by hand, and one small run from the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from launching import REPOSITORY

FOLDER = REPOSITORY / "kernels" / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

import torch  # noqa: E402
from loss_bench import candidates, card, driver, gate, results, worker  # noqa: E402
from loss_bench.cases import Case, plan_cases  # noqa: E402
from loss_bench.worker import make_inputs  # noqa: E402

TINY = Case("tiny", 32, 1031, 64, 0.5, "float32")
CPU = torch.device("cpu")


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


def ours(inputs: candidates.Inputs, **knobs):
    return candidates.ours(inputs, 128, backend="chunked", **knobs)


def chunked_case(dtype: str) -> candidates.Inputs:
    """600 of 700 rows have a label: five chunks of 128, the last of 88; more rows than are picked."""
    return make_inputs(Case("tiny", 32, 1031, 700, 600 / 700, dtype), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [ours, candidates.hf_eager])
def test_right_losses_pass_the_gate(loss, dtype):
    found = gate.Gate(chunked_case(dtype)).judge(loss)
    assert found["verdict"] == "passed"
    assert ("sums" in found["errors"]) == (loss is ours)


def test_without_sums_token_losses_are_judged():
    found = gate.Gate(chunked_case("bfloat16")).judge(lambda inputs: ours(inputs, sums=False))
    assert found["verdict"] == "passed" and set(found["errors"]) == {"loss", "dx", "dw", "token_loss"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_yardstick_is_the_error_of_the_eager_loss(dtype):
    """Computed a block of rows at a time and for picked rows and classes, it is still eager's own."""
    found = gate.Gate(chunked_case(dtype)).judge(candidates.hf_eager)
    for name in ("dx", "dw"):
        assert found["torch_errors"][name] == pytest.approx(found["errors"][name], rel=0.05)


def test_one_process_computes_the_answers_for_all(tmp_path, monkeypatch):
    first = gate.Gate(chunked_case("bfloat16"), tmp_path / "answers.pt").judge(ours)
    monkeypatch.setattr(gate, "textbook", None)
    assert gate.Gate(chunked_case("bfloat16"), tmp_path / "answers.pt").judge(ours) == first
    assert [path.name for path in tmp_path.iterdir()] == ["answers.pt"]


class Spoiled(torch.autograd.Function):
    """Passes a tensor on; its gradient goes through `spoil`."""

    @staticmethod
    def forward(ctx, x, spoil):
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.spoil(grad.clone()), None


def with_gradient(name: str, spoil):
    """Our loss with a fault in the gradient of an input."""

    def loss(inputs):
        wrong = Spoiled.apply(getattr(inputs, name), spoil)
        return ours(candidates.Inputs(**{**inputs.__dict__, name: wrong}))

    return loss


def with_fields(**spoil):
    """Our output with faults in some of its fields."""

    def loss(inputs):
        out = ours(inputs)
        return out._replace(**{name: change(getattr(out, name).clone()) for name, change in spoil.items()})

    return loss


def without_last_chunk(inputs):
    """The rows of the last chunk count for nothing."""
    labels = inputs.labels.clone()
    labels[(labels >= 0).nonzero()[-88:]] = candidates.IGNORE_INDEX
    return ours(candidates.Inputs(**{**inputs.__dict__, "labels": labels, "num_valid": 512}))


def frozen_weight(inputs):
    return candidates.hf_eager(candidates.Inputs(**{**inputs.__dict__, "weight": inputs.weight.detach()}))


def zeros_at(*where: int):
    return lambda x: x.index_fill(0, torch.arange(*where), 0)


MUTANTS = {
    "negated": (with_gradient("hidden", lambda grad: -grad), "wrong"),
    "halved": (lambda inputs: 0.5 * candidates.hf_eager(inputs), "wrong"),
    "1 % off": (lambda inputs: 1.01 * candidates.hf_eager(inputs), "outside"),
    "weight has no gradient": (frozen_weight, "wrong"),
    "last chunk left out": (without_last_chunk, "wrong"),
    "dX of the last rows missing": (with_gradient("hidden", zeros_at(630, 700)), "wrong"),
    "dW of the last class missing": (with_gradient("weight", zeros_at(1030, 1031)), "outside"),
    "rows without a label have a gradient": (
        with_gradient("hidden", lambda grad: torch.where(grad == 0, grad.abs().max(), grad)),
        "wrong",
    ),
    "the last token's loss is NaN": (
        with_fields(token_loss=lambda x: x.index_fill(0, torch.tensor([699]), float("nan"))),
        "wrong",
    ),
    "token losses of a chunk missing": (with_fields(token_loss=zeros_at(0, 150)), "wrong"),
    "samples in another order": (with_fields(sample_loss=lambda x: x.flip(0)), "wrong"),
    "sums 1 % off": (with_fields(sample_loss=lambda x: 1.01 * x), "outside"),
    "squares are sums": (with_fields(sample_loss_sq=lambda x: x.sqrt()), "wrong"),
    "a sample's squares are NaN": (
        with_fields(sample_loss_sq=lambda x: x.index_fill(0, torch.tensor([0]), float("nan"))),
        "wrong",
    ),
    "one token too many": (with_fields(sample_tokens=lambda x: x + torch.tensor([1, 0])), "wrong"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_losses_do_not(name, dtype):
    mutant, verdict = MUTANTS[name]
    assert gate.Gate(chunked_case(dtype)).judge(mutant)["verdict"] == verdict


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
    cut = {"candidate": "rival", "variant": "default", "status": "cut"}
    earlier.append({"case": case(128), "variants": [cut]})
    assert results.too_slow(earlier, case(256), 60.0) == {
        ("rival", "default"): "cut by the time limit at N 128, 100%"
    }
    assert results.too_slow(earlier, case(1024, "bfloat16"), 60.0) == {}


# --- the clock ----------------------------------------------------------------------------------------------


def test_a_gpu_is_busy_while_the_host_prepares_and_is_timed_from_then_on(monkeypatch):
    """Without a GPU: what is called of torch.cuda, in its order."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            self.number = len([call for call in calls if call == "new"])
            calls.append("new")

        def record(self):
            calls.append(f"record {self.number}")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, other):
            return 2.5

    def loss(inputs, chunk):
        calls.append("loss")
        return candidates.hf_eager(inputs)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(f"spin {cycles >= 10**7}"))
    candidate = candidates.Candidate("x", "torch", "torch", (candidates.Variant("default"),), loss)
    one = worker.Worker(candidate, torch.device("cuda"))
    one.inputs = make_inputs(TINY, CPU)
    clocks = one._run(candidate.variants[0], None)
    assert [call for call in calls if call != "new"] == ["spin True", "record 0", "loss", "record 1", "wait"]
    assert clocks["s"] == 2.5e-3 and clocks["host_s"] > 0


def test_of_all_candidates_one_holds_inputs_at_a_time():
    one = worker.Worker(candidates.CANDIDATES["hf eager"], CPU)
    turn = {"do": "turn", "case": asdict(TINY), "variant": "default", "chunk": None, "warmups": 0, "runs": 1}
    assert set(one.answer(turn)) == {"s", "cpu_s", "peak_bytes", "dx_bytes", "dw_bytes"}
    one.tidy()
    assert one.inputs is None
    assert one.answer(turn)["dw_bytes"] == 1031 * 32 * 4  # nothing of the earlier request is needed


def test_a_frozen_head_gets_no_gradient_and_counts_two_products():
    one = worker.Worker(candidates.CANDIDATES["chunked"], CPU)
    asked = {"case": asdict(TINY), "variant": "frozen head", "chunk": None, "warmups": 0, "runs": 1}
    assert one.answer({"do": "turn", **asked})["dw_bytes"] == 0
    entry = {"candidate": "x", "variant": "y", "status": "ok", "s": [1.0], "cpu_s": [1.0], "peak_bytes": [8]}
    flops = []
    for dw_bytes in (1, 0):
        summary = results.summarise(
            {"useful_flops": 3e12}, [{**entry, "dx_bytes": 1, "dw_bytes": dw_bytes}], "cpu"
        )
        flops.append(summary["variants"][0]["useful_tflops"])
    assert flops == pytest.approx([3.0, 2.0])


# --- the card -----------------------------------------------------------------------------------------------

SMI = """#!/bin/sh
case "$*" in
    *--id=GPU-7a*clocks_event_reasons*) [ -z "$OLD" ] || { echo 'not a valid field'; exit 2; } ;;
    *--id=GPU-7a*clocks_throttle_reasons*) ;;
    *) exit 9 ;;
esac
echo "575.57.08, 1980, 1755, 2619, 2619, 700.00, 700.00, 688.31, [N/A], 0x0000000000000044"
"""


@pytest.mark.parametrize("old", ["", "1"], ids=["new driver", "driver before 535"])
def test_driver_clocks_power_and_what_slows_a_card(tmp_path, monkeypatch, old):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OLD", old)
    assert card.read_card("7a") == {
        "driver": "575.57.08", "sm_clock_max_mhz": "1980", "sm_clock_mhz": "1755",
        "memory_clock_max_mhz": "2619", "memory_clock_mhz": "2619", "power_limit_w": "700.00",
        "power_limit_max_w": "700.00", "power_draw_w": "688.31", "temperature_c": card.NOT_KNOWN,
        "slowed_by": "power cap, hardware thermal",
    }  # fmt: skip


def test_what_nobody_says_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(card, "DRIVER_FILE", tmp_path / "version")
    assert set(card.read_card("7a").values()) == {card.NOT_KNOWN}
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC 12.3.0\n"
    )
    assert card.read_card("7a")["driver"] == "570.86.15"
    assert card.reasons("0x0") == "nothing" and card.reasons("0x1000") == "0x1000"


def test_the_table_names_driver_clocks_and_power():
    state = dict.fromkeys(card.FIELDS, card.NOT_KNOWN)
    document = {
        "environment": {
            "date": "2026-11-27", "device_type": "cuda", "threads": 1, "python": "3", "versions": {},
            "gpu": "H100", "cuda": "13.0", "card": {**state, "driver": "575.57.08"},
        },
        "ended": None, "missing": {},
        "cases": [
            {
                "case": asdict(TINY), "commit": None, "measured_at": "now", "load_average": None,
                "clock": "wall_s",
                "card_under_load": {**state, "sm_clock_mhz": "1755", "slowed_by": "power cap"},
                "variants": results.summarise(
                    {"useful_flops": 6e12}, [entry("ours", [1.5], 2**30, host_s=[0.0004])], "cuda"
                )["variants"],
            }
        ],
    }  # fmt: skip
    table = results.table(document)
    assert "Driver 575.57.08, CUDA 13.0; power limit not known W" in table
    assert "Under load: 1755 MHz (SM), not known (memory)" in table and "slowed by power cap." in table
    assert "Not complete: still running, or killed." in table
    assert "| ours | default |  | 1 | 1500 (1500-1500) | 0.4 |" in table


# --- the order of things ------------------------------------------------------------------------------------


class FakeWorkers:
    """Answers every request; each takes `seconds`, or more of `slow` candidates, of a clock of its own."""

    def __init__(self, monkeypatch, seconds: float, slow: dict[str, float] | None = None) -> None:
        self.now, self.asked, self.seconds, self.slow = 0.0, [], seconds, slow or {}
        monkeypatch.setattr(driver.time, "monotonic", lambda: self.now)

    def of(self, name: str):
        def ask(until, **request):
            seconds = self.slow.get(name, self.seconds)
            if self.now + seconds > until:
                self.now = until
                return {"status": driver.CUT, "reason": "by the time limit"}
            self.now += seconds
            self.asked.append((name, request["variant"], request["do"]))
            if request["do"] == "gate":
                return {"status": "ok", "gate": {"verdict": "passed"}, "chunk": None}
            return {"status": "ok", "s": [1.0], "cpu_s": [1.0], "peak_bytes": 8, "dx_bytes": 1, "dw_bytes": 1}

        return SimpleNamespace(ask=ask)


NAMES = ["three products", "hf eager", "chunked", "torch"]


def measure(workers, until, changed=lambda entries: None):
    protocol = driver.CPU_PROTOCOL._replace(rounds=3)
    return driver.measure_case(TINY, NAMES, "cpu", protocol, workers, lambda text: None, {}, changed, until)


def test_every_number_is_reported_before_the_next_is_measured(monkeypatch):
    workers, seen = FakeWorkers(monkeypatch, 1.0), []

    def changed(entries):
        variants = results.summarise({"useful_flops": 1.0}, entries, "cpu")["variants"]
        seen.append(sum(variant.get("num_runs", 0) for variant in variants))

    entries, complete = measure(workers, math.inf, changed)
    assert complete and len(entries) == 8 and seen == list(range(1, 3 * 8 + 1))
    gated = [name for name, _, what in workers.asked if what == "gate"]
    assert gated[:4] == NAMES  # every candidate's default comes first


def test_a_time_limit_leaves_the_least_important_out(monkeypatch):
    """20 s are ten gates and ten turns. Four defaults and one other variant need the first 10 s for
    their gates and first turns; the other half belongs to their rounds."""
    entries, complete = measure(FakeWorkers(monkeypatch, 1.0), 20.0)
    turns = {(e["candidate"], e["variant"]): len(e.get("s", ())) for e in entries}
    assert not complete
    assert turns == {
        ("three products", "ceiling"): 3, ("hf eager", "default"): 3, ("chunked", "default"): 3,
        ("chunked", "best chunk"): 3, ("chunked", "frozen head"): 0, ("torch", "default"): 3,
        ("torch", "chunked"): 0, ("torch", "best chunk"): 0,
    }  # fmt: skip
    assert [e["status"] for e in entries[-2:]] == [driver.NO_TIME_LEFT] * 2


def test_a_rival_that_never_answers_is_cut_and_costs_no_other_its_numbers(monkeypatch):
    entries, complete = measure(FakeWorkers(monkeypatch, 1.0, {"torch": 1000.0}), 20.0)
    found = {e["candidate"]: e for e in entries if e["variant"] in ("default", "ceiling")}
    assert not complete and found["torch"]["status"] == driver.CUT
    assert all(len(found[name]["s"]) == 1 for name in NAMES[:3])


def test_a_process_that_does_not_answer_in_time_is_ended(monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    popen = subprocess.Popen
    monkeypatch.setattr(driver.subprocess, "Popen", lambda command, **options: popen(sleeper, **options))
    one = driver.WorkerProcess("x", "cpu", 600.0)
    reply = one.ask(time.monotonic() + 0.2, do="turn")
    assert reply["status"] == driver.CUT and not one.alive


# --- the command --------------------------------------------------------------------------------------------


def test_a_small_run_writes_json_table_and_picture(tmp_path):
    command = [
        sys.executable, str(FOLDER / "fused_loss.py"), "--device", "cpu", "--size", "tiny",
        "--dtype", "float32", "--candidates", "three products", "hf eager", "chunked", "liger",
        "--rounds", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["complete"] and document["kind"] == "fused_loss"
    assert document["ended"] == "all measured"
    assert document["environment"]["sources"] == results.digest_of_sources()
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert document["missing"] == {"liger": "does not run on CPUs"}
    (case,) = document["cases"]
    found = {(v["candidate"], v["variant"]): v for v in case["variants"]}
    assert set(found) == {
        ("three products", "ceiling"), ("hf eager", "default"),
        ("chunked", "default"), ("chunked", "best chunk"), ("chunked", "frozen head"),
    }  # fmt: skip
    for variant in found.values():
        assert variant["status"] == "ok" and variant["num_runs"] == 2
        assert variant["ratio_to_eager"]["time"] > 0
    for variant in ("default", "frozen head"):
        assert found["chunked", variant]["gate"]["verdict"] == "passed"
    assert found["chunked", "default"]["dw_gib"] > found["chunked", "frozen head"]["dw_gib"] == 0
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "| chunked | best chunk | 64 |" in (tmp_path / "table.md").read_text()
    assert "| chunked | default |" in done.stdout
    again = subprocess.run(
        [*command, "--resume", "--tokens", "64", "16"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-3000:]
    cases = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert cases[0] == case and [c["case"]["num_tokens"] for c in cases] == [64, 16]


WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_time_limit_ends_a_run_that_has_no_end_also_without_matplotlib(tmp_path):
    command = [
        sys.executable, "-c", WITHOUT_MATPLOTLIB, str(FOLDER / "fused_loss.py"), "--device", "cpu",
        "--size", "tiny", "--dtype", "float32", "--candidates", "hf eager", "chunked",
        "--rounds", "1000000", "--minutes", "0.3", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no picture: matplotlib is not installed" in done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert not document["complete"] and document["ended"] == "time limit of 0.3 minutes"
    assert "Not complete: time limit of 0.3 minutes." in (tmp_path / "table.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md"}


ONE_TURN = """
import json, sys, torch
from loss_bench.candidates import CANDIDATES
from loss_bench.worker import Worker
worker = Worker(CANDIDATES[sys.argv[1]], torch.device("cpu"))
turn = {"do": "turn", "variant": "default", "chunk": None, "warmups": 1, "runs": 1}
print(json.dumps(worker.answer({**turn, "case": json.loads(sys.argv[2])})))
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
