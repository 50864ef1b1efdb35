"""The evidence command: what it keeps, that it ends in time, and the arithmetic of its ratios.

No test asserts a time of the trainer; the one whole run is tiny and only shows that the parts fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, run_command

from versatune_ds.apps.bench.shapes import find_shape
from versatune_ds.apps.evidence import comparison, correctness, study
from versatune_ds.apps.evidence import record as record_module
from versatune_ds.apps.evidence.cases import ARMS, CPU_CASES, GPU_CASES, choose_cases
from versatune_ds.apps.evidence.command import find_checkout, run_evidence, summarise
from versatune_ds.apps.evidence.kernel import run_kernel
from versatune_ds.apps.evidence.profiling import TOP, longest, union_s
from versatune_ds.apps.evidence.ratios import compare
from versatune_ds.apps.evidence.record import LoadWatch, Record, ask_card, describe_machine, memory_gib
from versatune_ds.apps.evidence.samples import read_rows, samples_by_domain, write_samples
from versatune_ds.apps.evidence.study import run_study
from versatune_ds.apps.programs import Deadline, Ended, run_program
from versatune_ds.apps.study.config import load_study
from versatune_ds.apps.study.jobs import StudyPlan
from versatune_ds.foundations.constants import IGNORE_INDEX
from versatune_ds.foundations.errors import ConfigError

GPU_TESTS = """
import time
import pytest

pytestmark = pytest.MARK.gpu


def test_sound():
    pass


def test_wrong():
    assert 1 + 1 == 3, "a text of its own"


@pytest.mark.skipif(True, reason="needs two of them")
def test_elsewhere():
    pass


@pytest.fixture
def broken():
    raise RuntimeError("no such fixture")


def test_without_a_start(broken):
    pass


@pytest.fixture
def broken_later():
    yield
    raise RuntimeError("cannot clean up")


def test_without_an_end(broken_later):
    pass


def test_wrong_and_without_an_end(broken_later):
    assert False, "the first text counts"
""".replace("MARK", "mark")  # this file itself marks nothing


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "stage.json", "1 test", {"card": None}, "versatune-ds evidence")


# --- stage 1 ------------------------------------------------------------------------------------------------


def make_checkout(folder: Path, text: str) -> Path:
    tests = folder / "checkout" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_on_gpu.py").write_text(text)
    (tests / "test_elsewhere.py").write_text("import a_package_that_is_not_here\n")  # marks nothing
    return folder / "checkout"


def test_every_outcome_of_the_gpu_tests_is_kept(record, tmp_path):
    lines = correctness.run_correctness(record, Deadline(60), make_checkout(tmp_path, GPU_TESTS), "tiny")
    results = record.results
    assert results["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "error": 2}
    assert results["skips"] == {"Skipped: needs two of them": 1}
    texts = {name.rpartition("::")[2]: text for name, text in results["failures"].items()}
    assert "a text of its own" in texts["test_wrong"]
    assert "no such fixture" in texts["test_without_a_start"]
    assert "cannot clean up" in texts["test_without_an_end"]
    assert "the first text counts" in texts["test_wrong_and_without_an_end"]
    assert lines[0] == "2 error, 2 failed, 1 passed, 1 skipped"
    assert any(line.startswith("failed: ") and line.endswith("::test_wrong") for line in lines)


def test_a_file_that_cannot_be_imported_is_an_error_and_the_others_run(record, tmp_path):
    checkout = make_checkout(tmp_path, GPU_TESTS)
    (checkout / "tests" / "test_broken.py").write_text("import nothing_of_this_name  # mark.gpu\n")
    correctness.run_correctness(record, Deadline(60), checkout, "tiny")
    assert record.results["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "error": 3}
    assert "nothing_of_this_name" in record.results["failures"]["tests/test_broken.py"]


def test_what_was_tested_before_the_time_was_up_is_kept(record, tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "RESERVE_S", 0.0)
    text = GPU_TESTS + "\n\ndef test_zz_endless():\n    time.sleep(600)\n"
    lines = correctness.run_correctness(record, Deadline(8), make_checkout(tmp_path, text), "tiny")
    assert record.results["counts"]["unfinished"] == 1 and record.results["counts"]["passed"] == 1
    assert any(line.startswith("unfinished: ") and line.endswith("::test_zz_endless") for line in lines)
    assert "its time limit" in lines[-1]


def test_a_line_that_is_still_being_written_is_left_for_the_next_reading(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"id": "a", "outcome": "passed", "seconds": 1}\n{"id": "b", "outc')
    assert correctness.read_results(file)["counts"] == {"passed": 1}


def test_only_skips_are_no_evidence():
    results = {"counts": {"skipped": 3}, "failures": {}, "skips": {"needs a CUDA device": 3}, "tests": {}}
    assert correctness.summary_lines(results)[-1] == "nothing was tested: every test was skipped"


def test_an_installed_wheel_has_no_tests_and_says_so(record):
    lines = correctness.run_correctness(record, Deadline(60), None, "tiny")
    assert "run from a checkout" in lines[0] and "not_run" in record.results


# --- programs -----------------------------------------------------------------------------------------------


def test_a_program_over_its_time_ends_with_its_children(tmp_path):
    child = "import time\nwhile True: time.sleep(0.1)"
    parent = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "print('under way', flush=True)\n"
        "time.sleep(600)\n"
    )
    ended = run_program([sys.executable, "-c", parent], 3.0)
    assert ended.code is None and ended.in_a_line is not None and ended.in_a_line.endswith(": under way")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} is still there")


def test_a_command_that_is_asked_to_end_takes_its_program_along(tmp_path):
    pid_file = tmp_path / "pid"
    program = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    command = (
        "import sys\n"
        "from versatune_ds.apps.programs import ending_with_programs, run_program\n"
        "with ending_with_programs():\n"
        f"    run_program([sys.executable, '-c', {program!r}], 600.0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", command])
    while not (pid_file.is_file() and pid_file.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_a_program_that_fails_is_told_by_its_last_line():
    ended = run_program([sys.executable, "-c", "raise ValueError('just so')"], 30.0)
    assert ended.in_a_line == "left with 1: ValueError: just so"
    assert run_program([sys.executable, "-c", "pass"], 30.0).in_a_line is None


# --- the card -----------------------------------------------------------------------------------------------


def fake_nvidia_smi(folder: Path, monkeypatch, answers: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{answers}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_first_visible_card_is_asked(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'A Card, 1979.1, [N/A]'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = ask_card(("name", "driver_version", "clocks.sm"))
    assert found == {"name": "A Card", "driver_version": "1979.1", "clocks.sm": "[N/A]"}
    assert "--id=3" in (tmp_path / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ask_card(("name",)) is None


def test_without_nvidia_smi_torch_is_asked(monkeypatch):
    """A card is never taken for none: everything would be tiny."""
    monkeypatch.setattr(record_module, "ask_card", lambda fields: None)
    monkeypatch.setattr(
        record_module, "ASK_TORCH", """print('{"name": "A Card", "memory.total": "81559"}')"""
    )
    card = describe_machine()["card"]
    assert card["name"] == "A Card" and card["driver_version"] == "not known"
    assert memory_gib(card) == pytest.approx(79.65, abs=0.01)


def test_clocks_are_those_under_load(tmp_path, monkeypatch):
    # clocks.sm, clocks.mem, power, temperature, utilisation: idle, then twice at work
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    counter = tmp_path / "count"
    answers = (
        f"echo x >> {counter}\n"
        f"case $(wc -l < {counter}) in\n"
        "1) echo '345, 1593, 70, 30, 0';;\n"
        "2) echo '1980, 2619, 650, 60, 100';;\n"
        "*) echo '1700, 2619, 700, 64, 99';;\n"
        "esac"
    )
    fake_nvidia_smi(tmp_path, monkeypatch, answers)
    watch = LoadWatch()
    watch.look()
    assert watch.summary() is None
    watch.look()
    watch.look()
    summary = watch.summary()
    assert summary is not None and summary["readings"] == 2
    assert summary["clocks.sm"] == 1840 and summary["power.draw"] == 675


# --- stage 3 ------------------------------------------------------------------------------------------------


def test_both_trainers_get_the_same_tokens_and_labels(tmp_path):
    for name in ("once", "again"):
        write_samples(tmp_path / name, num_tokens=5000, max_length=128, vocab_size=500, num_domains=3)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()
    with np.load(tmp_path / "once") as file:
        domains = file["domains"].tolist()
    columns, _ = read_rows(tmp_path / "once")
    sources = samples_by_domain(tmp_path / "once", 3)
    ids, labels = ([row.tolist() for row in columns[name]] for name in ("input_ids", "labels"))
    assert 5000 <= sum(map(len, ids)) < 5000 + 128
    assert all(2 <= token < 500 for row in ids for token in row)
    for domain in range(3):
        own = [i for i, other in enumerate(domains) if other == domain]
        source = sources[domain]
        assert len(source.lengths) == len(own) > 1
        for i, row in enumerate(own):
            tokens, mask = source.sample(i)
            assert tokens.tolist() == ids[row]
            assert np.where(mask, tokens.astype(np.int64), IGNORE_INDEX).tolist() == labels[row]
            assert source.lengths[i] == len(tokens) and source.supervised[i] == mask.sum() > 0
            assert mask.sum() == len(tokens) - len(tokens) // 2  # the first token never: TRL has none either


def test_without_pyarrow_and_pandas_ours_is_measured_and_trl_is_left_out_with_the_reason(record, monkeypatch):
    for name in ("pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)  # as on a host that does not have them

    def answer(command, *args, **named):
        spec, result = Path(command[-2]), Path(command[-1])
        data = Path(json.loads(spec.read_text())["data"])
        assert len(samples_by_domain(data, 1)[0].lengths) > 1
        result.write_text(json.dumps({"spec": {}, **measured("ours", 1, 1.0)}))
        return Ended(0, 1.0, "")

    monkeypatch.setattr(comparison, "run_program", answer)
    lines = comparison.run_comparison(record, Deadline(600), None, "tiny")
    status = {run["arm"]: run["status"] for run in record.results["cases"][0]["runs"]}
    assert status == {"ours": "measured", "trl-varlen": "not run", "trl-sdpa": "not run"}
    assert any(line.startswith("| trl-sdpa | 0 | not installed: pyarrow, pandas |") for line in lines)


@pytest.mark.parametrize(("gib", "layers"), [(139.8, [8, 32]), (79.6, [4, 12]), (44.5, [2]), (23.0, [2])])
def test_the_card_decides_and_the_state_fits(gib, layers):
    cases = choose_cases("auto", gib)
    assert [case.layers for case in cases] == layers
    for case in cases:
        state_gib = 16 * dataclasses.replace(find_shape(case.shape), layers=case.layers).parameters / 2**30
        assert state_gib < 0.92 * gib


def test_a_card_of_any_size_has_a_case():
    assert choose_cases("auto", 0.5) == GPU_CASES[-1][1]
    assert choose_cases("tiny", 139.8) == [CPU_CASES["tiny"]]


CASE = CPU_CASES["tiny"]
FIRST = math.log(4096)


def measured(arm: str, number: int, seconds: float, *, gib: float = 1.0, losses=(FIRST, 8.0)) -> dict:
    tokens = {"real": 2000, "slot": 2048, "supervised": 1000, "sum_squared_lengths": 200_000}
    more = {"peak_gib": gib, "losses": list(losses), "attention": "sdpa", "liger": "off"}
    return {
        "arm": arm, "round": number, "status": "measured", "seconds": seconds, "cpu_s": seconds,
        "tokens": tokens, **more,
    }  # fmt: skip


def test_ratios_are_of_runs_of_the_same_round():
    # the machine is half as fast in the second round: each ratio is still 2 or 3, the median 2.5
    runs = [
        measured("ours", 1, 1.0), measured("trl-sdpa", 1, 2.0, gib=1.25),
        measured("ours", 2, 2.0), measured("trl-sdpa", 2, 6.0, gib=1.25),
        {"arm": "trl-varlen", "round": 2, "status": "not run", "reason": "needs CUDA"},
    ]  # fmt: skip
    found = compare(CASE, runs, peak=None)
    # each CPU second is half a second of wall time for ours and a whole one for TRL
    for run in runs[:4]:
        run["cpu_s"] = run["seconds"] / (2 if run["arm"] == "ours" else 1)
    assert compare(CASE, runs, peak=None)["ratios"]["trl-sdpa"] == {
        "pairs": [2.0, 3.0],
        "tokens_per_s": 2.5,
        "cpu_pairs": [4.0, 6.0],
        "tokens_per_cpu_s": 5.0,
        "peak_memory": pytest.approx(0.8),
    }
    ours = found["arms"]["ours"]
    assert ours["real_tokens_per_s"] == 1500.0 and ours["runs"] == 2  # of 2000 and 1000
    assert ours["padding"] == pytest.approx(48 / 2048) and ours["mfu"] is None
    assert "trl-varlen" not in found["arms"]


def test_mfu_and_ceiling_by_hand():
    # tiny, 2 layers: N = 2 (2 x 64 x 16 x (4 + 2) + 3 x 64 x 160 + 2 x 64) + 64
    n = 2 * (2 * 64 * 16 * 6 + 3 * 64 * 160 + 2 * 64) + 64
    flops = 6 * n * 2000 + 6 * 64 * 4096 * 1000 + 6 * 2 * 64 * 200_000
    run = measured("ours", 1, 0.5) | {"matmul_ceiling": {"tflops": 0.1}}
    rates = compare(CASE, [run], peak=0.2)["arms"]["ours"]
    assert rates["achieved_tflops"] == pytest.approx(flops / 0.5 / 1e12)
    assert rates["mfu"] == pytest.approx(flops / 0.5 / 0.2e12)
    assert rates["of_ceiling"] == pytest.approx(flops / 0.5 / 0.1e12)
    # as most papers count: all parameters, whole packs of 128, no causal half
    papers = (6 * (n + 2 * 64 * 4096) + 12 * 2 * 64 * 128) * 2048
    assert rates["mfu_6n"] == pytest.approx(papers / 0.5 / 0.2e12)


@pytest.mark.parametrize(
    ("losses", "broken"),
    [
        ((FIRST, 8.0), None),
        ((FIRST + 0.5, 8.0), "first_loss_holds"),  # other weights
        ((FIRST, 7.5), "curves_agree"),  # another learning rate
        ((FIRST, FIRST), "losses_fall"),  # it does not learn
    ],
)
def test_arms_that_do_not_do_the_same_are_found_out(losses, broken):
    runs = [measured("ours", 1, 1.0), measured("trl-sdpa", 1, 1.0, losses=losses)]
    found = compare(CASE, runs, peak=None)["checks"]
    wrong = [name for name in ("first_loss_holds", "curves_agree", "losses_fall") if not found[name]]
    assert (broken is None and not wrong) or broken in wrong


@pytest.fixture
def canned(monkeypatch):
    """Arms that answer at once; `canned["trl-sdpa"]` may be replaced."""
    answers = {name: measured(name, 0, 1.0) for name in ("ours", "trl-sdpa")}
    failure = {"status": "failed", "reason": "left with 1: OutOfMemoryError", "output": "..."}
    answers["trl-varlen"] = failure
    asked = []

    def run_arm(arm, case, *args):
        asked.append(arm.name)
        return {key: value for key, value in answers[arm.name].items() if key not in ("arm", "round")}

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    return answers, asked


def test_arms_alternate_and_the_file_is_rewritten_after_each(record, canned, monkeypatch):
    _, asked = canned
    runs_in_file, write = [], record.write

    def noting() -> None:
        write()
        runs_in_file.append(len(json.loads(record.path.read_text())["results"]["cases"][0]["runs"]))

    monkeypatch.setattr(record, "write", noting)
    comparison.run_comparison(record, Deadline(60), None, "tiny")
    assert asked == [arm.name for arm in ARMS] * 2
    assert runs_in_file == [1, 2, 3, 4, 5, 6]


def test_an_arm_that_fails_is_kept_with_its_reason_and_the_others_go_on(record, canned):
    lines = comparison.run_comparison(record, Deadline(60), None, "tiny")
    kept = record.results["cases"][0]
    assert [run["status"] for run in kept["runs"]] == ["measured", "failed", "measured"] * 2
    assert any("| trl-varlen | 0 | left with 1: OutOfMemoryError |" in line for line in lines)
    assert kept["ratios"]["trl-sdpa"]["pairs"] == [1.0, 1.0]


def test_no_arm_starts_without_time_for_it(tmp_path):
    arm = next(arm for arm in ARMS if arm.name == "ours")
    run = comparison.run_arm(arm, CASE, {"stage": 0}, tmp_path, Deadline(30), 25.0, None)
    assert run["status"] == "not run" and "no time left" in run["reason"]
    assert not list(tmp_path.iterdir())


def test_an_arm_that_cannot_start_is_told_why(tmp_path):
    (tmp_path / "samples.npz").write_bytes(b"")
    arm = next(arm for arm in ARMS if arm.name == "ours")
    run = comparison.run_arm(arm, CASE, {"stage": 0}, tmp_path, Deadline(120), None, None)
    assert run["status"] == "failed" and "No data left in file" in run["reason"]


# --- stage 4 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "seeds"), [("tiny", 1), ("auto", 3)])
def test_a_study_has_settings_that_hold_and_its_results_are_taken_over(record, monkeypatch, size, seeds):
    calls: list[StudyPlan] = []

    def write_results(command: list[str], limit_s: float, cwd: str) -> Ended:
        monkeypatch.chdir(cwd)
        _, _, _, verb, _, config, *overrides = command
        assert verb == "study"
        settings = load_study(config, overrides)
        calls.append(StudyPlan(settings, Path(cwd), Path(cwd)))
        results = settings.dir / "results"
        results.mkdir(parents=True)
        (results / "summary.json").write_text('{"arms": {}}')
        (results / "results.md").write_text("# Study\n\n| arm |")
        return Ended(0, 1.0, "")

    monkeypatch.setattr(study, "run_program", write_results)
    assert run_study(record, Deadline(60), find_checkout(), size) == ["| arm |"]
    assert record.results["summary"] == {"arms": {}} and record.results["problem"] is None
    (plan,) = calls
    assert plan.check() > 0 and len(plan.study.seeds) == seeds
    assert plan.study.dir == record.path.parent / "study"


def test_fifty_times_the_tokens_of_the_file():
    file = REPOSITORY / "configs" / "studies" / "smollm2.yaml"
    tokens = []
    for overrides in ([], list(study.ON_GPU)):
        settings = load_study(file, overrides).settings
        batch = settings["batch"]
        tokens.append(batch["pack_len"] * batch["packs_per_step"] * settings["train"]["max_steps"])
    assert tokens[1] == 50 * tokens[0]


def test_a_study_that_has_no_time_left_is_kept_and_said(record, monkeypatch):
    monkeypatch.setattr(study, "run_program", lambda *_, **__: Ended(None, 30.0, "[3/57] uniform_seed-11"))
    (line,) = run_study(record, Deadline(60), find_checkout(), "auto")
    assert "time limit: [3/57] uniform_seed-11; its runs are kept in" in line
    (line,) = run_study(record, Deadline(60), None, "auto")
    assert line.endswith("no configs/studies beside the package: run from a checkout")


# --- the profile --------------------------------------------------------------------------------------------


def test_kernels_that_overlap_count_once():
    assert union_s([(0.0, 1.0), (0.5, 2.0), (0.6, 0.7), (3.0, 4.0)]) == pytest.approx(3.0)
    assert union_s([]) == 0.0


def test_the_longest_names_come_first_with_all_their_calls():
    took = [("a", 1.0), ("b", 1.5), ("a", 1.0), *((f"other {i}", 0.001) for i in range(30))]
    found = longest(took, wall_s=4.0)
    assert len(found) == TOP
    assert found[0] == {"name": "a", "seconds": 2.0, "share": 0.5, "calls": 2}
    assert found[1]["name"] == "b"


# --- the command --------------------------------------------------------------------------------------------


def test_wrong_stages_and_times_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no stage 7 \(known: 1, 2, 3, 4\)"):
        run_evidence(tmp_path, 1.0, [7], "tiny")
    with pytest.raises(ConfigError, match="time above 0"):
        run_evidence(tmp_path, 0.0, [1], "tiny")


def test_the_kernel_benchmark_is_not_started_without_time_for_it(record):
    lines = run_kernel(record, Deadline(35), find_checkout(), "tiny")
    assert lines[0].startswith("not run: no time left") and "benchmark" not in record.results


def test_the_checkout_is_found():
    checkout = find_checkout()
    assert checkout is not None and (checkout / "tests" / "apps").is_dir()


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    """The rehearsal: what is run on a GPU, tiny, from the tests to the table."""
    out = tmp_path / "out"
    started = time.monotonic()
    said = run_command("versatune-ds", "evidence", "--out", str(out), "--minutes", "6")
    assert time.monotonic() - started < 6 * 60
    files = sorted(path.name for path in out.iterdir())
    assert files == ["stage1_correctness.json", "stage2_kernel.json", "stage3_trainer.json", "summary.md"]
    stages = {name: json.loads((out / name).read_text()) for name in files if name.endswith(".json")}
    for value in stages.values():
        assert value["ended"] == "done" and value["summary"]
        assert {"date", "card", "cpu", "versions", "commit"} <= value["environment"].keys()
        assert value["environment"]["size"] == "tiny" and value["environment"]["versions"]["trl"]
    tests = stages["stage1_correctness.json"]["results"]
    assert tests["counts"].keys() == {"skipped"} and "problem" not in tests
    kernel = stages["stage2_kernel.json"]["results"]
    assert kernel["problem"] is None, kernel["output"]
    assert {v["candidate"] for v in kernel["benchmark"]["cases"][0]["variants"]} >= {"hf eager", "chunked"}
    case = stages["stage3_trainer.json"]["results"]["cases"][0]
    status = {run["arm"]: run["status"] for run in case["runs"]}
    assert status == {"ours": "measured", "trl-varlen": "not run", "trl-sdpa": "measured"}, case["runs"]
    assert case["checks"]["first_loss_holds"] and case["checks"]["losses_fall"]
    assert len(case["ratios"]["trl-sdpa"]["pairs"]) == 2
    assert all(run["profile"]["top"] for run in case["runs"] if run["status"] == "measured")
    assert said.endswith((out / "summary.md").read_text() + "\n") and summarise(out) in said
