"""Whole detections: what a known model is found to know, restarts in every step, ranks, and bad input."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detect_cases import NAMES, write_config
from judge_server import JudgeServer, Reply, chat, judge_by_words
from launching import REPOSITORY, case_file, launch_soundly, rank_environment, read_jsonl, run_command
from speaking_models import unigram_model

from versatune_ds.apps.detect import endpoint, result, run
from versatune_ds.apps.detect.journal import Journal
from versatune_ds.apps.detect.run import detect
from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.foundations.errors import ConfigError, StateError, VersaTuneError

CASES_FILE = REPOSITORY / "tests" / "support" / "detect_cases.py"
WORDS = {" law": 0.5, " code": 0.2, " other": 0.1}


class Killed(BaseException):
    """Ends a run as abruptly as a test can within its own process."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return unigram_model(tmp_path_factory.mktemp("detected"), WORDS, end=0.2)


@pytest.fixture(scope="module")
def server():
    with JudgeServer(judge_by_words) as server:
        yield server


@pytest.fixture(scope="module")
def whole(model, server, tmp_path_factory) -> Path:
    """Folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    detect(load_config(write_config(folder / "config.yaml", model, server.url)), folder / "out")
    return folder / "out"


def config_of(tmp_path, model, server, *overrides, **detection):
    url = server if isinstance(server, str) else server.url
    return load_config(write_config(tmp_path / "config.yaml", model, url, **detection), overrides)


def by_index(path):
    lines = read_jsonl(path)
    assert len({line["index"] for line in lines}) == len(lines), "an index stands twice"
    return {line["index"]: line for line in lines}


def same_results(folder, whole):
    assert by_index(folder / "sequences.jsonl") == by_index(whole / "sequences.jsonl")
    ours, theirs = by_index(folder / "judgements.jsonl"), by_index(whole / "judgements.jsonl")
    assert ours == theirs
    ours, theirs = (json.loads((f / "knowledge.json").read_text()) for f in (folder, whole))
    for key in ("domains", "interval_95", "rounds", "most_probable", "texts"):
        assert ours[key] == theirs[key]


# --- the result ---------------------------------------------------------------------------------------------


def test_a_known_model_is_found_to_know_what_it_knows(whole):
    content = json.loads((whole / "knowledge.json").read_text())
    texts = content["texts"]
    sequences = by_index(whole / "sequences.jsonl")
    blank = [i for i, line in sequences.items() if not line["text"].strip()]
    assert texts["generated"] == 40 and texts["blank"] == len(blank) > 0
    assert texts["judged"] == 40 - len(blank) and texts["unparsable"] == 0
    # the mean over texts of the shares of words, computed here from the texts
    shares = [
        [line["text"].split().count(name) / len(line["text"].split()) for name in NAMES]
        for line in sequences.values()
        if line["text"].strip()
    ]
    np.testing.assert_allclose(list(content["domains"].values()), np.mean(shares, axis=0), rtol=1e-6)
    assert content["domains"]["law"] > content["domains"]["code"] > content["domains"]["other"]
    assert [r["texts"] for r in content["rounds"]] == [
        sum(i // 20 == t and i not in blank for i in range(40)) for t in range(2)
    ]
    assert content["judge"]["model"] == "judge" and content["judge"]["mean_name_mass"] == pytest.approx(1.0)
    assert content["generation"]["sequences"] == 20 and len(content["model"]["fingerprint"]) == 64
    assert (whole / "knowledge.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_is_what_training_starts_from(whole, tmp_path, model, server):
    from versatune_ds.domain.reference import prior_weights
    from versatune_ds.domain.table import DomainTable

    config = config_of(tmp_path, model, server, f"domains.initial={whole / 'knowledge.json'}")
    weights = prior_weights(config.domains, DomainTable(config.domains.names))
    expected = json.loads((whole / "knowledge.json").read_text())["domains"]
    assert weights == pytest.approx([expected[name] for name in NAMES])


# --- restarts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tear", [False, True])
@pytest.mark.parametrize(("step", "appends"), [("sequences", 2), ("judgements", 3)])
def test_a_killed_run_goes_on_to_the_same_end(
    step, appends, tear, whole, model, server, tmp_path, monkeypatch, caplog
):
    config = config_of(tmp_path, model, server)
    original, count = Journal.append, {"sequences": 0, "judgements": 0}

    def append(self, lines):
        name = self.path.stem
        count[name] += 1
        if name == step and count[name] > appends:
            if tear:
                self._file.write((json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:15]).encode())
            self._file.flush()
            raise Killed
        original(self, lines)

    monkeypatch.setattr(Journal, "append", append)
    with pytest.raises(Killed):
        detect(config, tmp_path / "out")
    monkeypatch.setattr(Journal, "append", original)
    assert not (tmp_path / "out" / "knowledge.json").exists()
    before = (tmp_path / "out" / f"{step}.jsonl").read_bytes().count(b"\n")
    assert 0 < before < 40
    monkeypatch.setattr(logging.getLogger("versatune_ds"), "propagate", True)
    caplog.clear()
    detect(config, tmp_path / "out")
    assert ("its last line was incomplete" in caplog.text) is tear
    same_results(tmp_path / "out", whole)


def test_a_run_killed_before_its_result_only_aggregates(whole, model, server, tmp_path, monkeypatch):
    config = config_of(tmp_path, model, server)
    monkeypatch.setattr(result, "aggregate", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        detect(config, tmp_path / "out")
    monkeypatch.undo()
    asked = len(server.requests)
    monkeypatch.setattr(run, "build_generator", lambda *_: pytest.fail("the model was loaded again"))
    detect(config, tmp_path / "out")
    assert len(server.requests) == asked
    same_results(tmp_path / "out", whole)


def test_a_server_that_dies_in_between_costs_nothing_that_was_judged(whole, model, server, tmp_path):
    def dying(text, number):
        return judge_by_words(text, number) if number < 12 else Reply(b"out of memory", 500)

    with JudgeServer(dying) as bad:
        config = config_of(tmp_path, model, bad)
        with pytest.raises(VersaTuneError, match=r"status 500.*out of memory.*judged so far is kept"):
            detect(config, tmp_path / "out")
    assert len(read_jsonl(tmp_path / "out" / "judgements.jsonl")) >= 12
    moved = config_of(tmp_path, model, server)  # the server's address may change
    detect(moved, tmp_path / "out")
    same_results(tmp_path / "out", whole)


def test_a_stop_request_ends_soundly(whole, model, server, tmp_path, monkeypatch):
    config = config_of(tmp_path, model, server)
    original = Journal.append

    def append(self, lines):
        original(self, lines)
        if len(self.lines) == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "append", append)
    assert detect(config, tmp_path / "out") is None
    monkeypatch.setattr(Journal, "append", original)
    assert len(read_jsonl(tmp_path / "out" / "sequences.jsonl")) in (16, 24)
    assert detect(config, tmp_path / "out") == tmp_path / "out" / "knowledge.json"
    same_results(tmp_path / "out", whole)


@pytest.mark.slow
def test_kill_dash_nine(whole, model, tmp_path):
    """A real process, killed while it judges; the same command goes on."""

    def slowly(text, number):
        time.sleep(0.15)
        return judge_by_words(text, number)

    out = tmp_path / "out"
    with JudgeServer(slowly) as server:
        config = write_config(tmp_path / "config.yaml", model, server.url)
        environment = {k: v for k, v in rank_environment(0, 1, 0).items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, "-m", "versatune_ds.cli.main", "detect"]
        command += ["--config", str(config), "--out", str(out)]
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while not ((out / "judgements.jsonl").exists() and (out / "judgements.jsonl").read_bytes()):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        assert not (out / "knowledge.json").exists()
        detect(load_config(config), out)
    same_results(out, whole)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(whole, model, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", model, server.url)
    by_model = ["detect.judge.kind=model", f"detect.judge.model={model}", "detect.judge.batch_size=3"]
    cases = [
        {"config": str(config), "out": str(tmp_path / "endpoint"), "overrides": []},
        {"config": str(config), "out": str(tmp_path / "model"), "overrides": by_model},
    ]
    launch_soundly(CASES_FILE, 2, case_file(tmp_path, cases))
    same_results(tmp_path / "endpoint", whole)
    detect(load_config(config, by_model), tmp_path / "one")
    two, one = (by_index(tmp_path / folder / "judgements.jsonl") for folder in ("model", "one"))
    assert two.keys() == one.keys()
    for index, line in one.items():
        assert two[index]["probabilities"] == pytest.approx(line["probabilities"], rel=1e-4)


@pytest.mark.slow
def test_the_sample_under_the_real_launcher(tmp_path, capsys):
    """The quick start's settings and the embedded judge, on two ranks; the data must be prepared before."""
    text = (REPOSITORY / "configs" / "quickstart.yaml").read_text().replace("runs/", f"{tmp_path}/")
    config = tmp_path / "quickstart.yaml"
    config.write_text(text)
    assert main(["sample", str(tmp_path / "sample")]) == 0
    launcher = ("deepspeed", "--num_gpus", "2", "--no_local_rank")
    verb = ("--module", "versatune_ds.cli.main", "detect", "--config", str(config))
    small = ("detect.sequences=40", "detect.max_new_tokens=24", "detect.batch_size=16")
    assert main(["detect", "--config", str(config)]) == 4
    assert f"prepare --config {config}" in capsys.readouterr().err
    assert main(["prepare", "--config", str(config)]) == 0
    out = run_command(*launcher, *verb, *small, timeout_s=300)
    folder = tmp_path / "quickstart" / "detect"
    assert "model.weights is random" in out and "accuracy" in out and str(folder / "knowledge.json") in out
    content = json.loads((folder / "knowledge.json").read_text())
    assert content["texts"]["generated"] == len(by_index(folder / "sequences.jsonl")) == 80
    assert content["judge"]["held_out_accuracy"] > 0.5
    assert set(content["judge"]["confusion"]) == set(content["domains"])


# --- bad input ----------------------------------------------------------------------------------------------


def test_texts_of_other_settings_are_not_mixed(whole, model, server, tmp_path):
    def again(*overrides):
        detect(config_of(tmp_path, model, server, *overrides), whole)

    with pytest.raises(StateError, match=r"temperature was 1\.0 and is now 0\.5.*--out"):
        again("detect.temperature=0.5")
    with pytest.raises(StateError, match=r"judgements\.jsonl.*model was 'judge' and is now 'another'"):
        again("detect.judge.endpoint.model=another")
    with pytest.raises(StateError, match=r"domains was \['law', 'code', 'other'\]"):
        again("domains.names=[law, code]")
    other = unigram_model(tmp_path / "other", WORDS | {" law": 0.4, " code": 0.3}, end=0.2)
    with pytest.raises(StateError, match="model_fingerprint was"):
        detect(config_of(tmp_path, model, server, f"detect.model={other}"), whole)


def test_another_judge_needs_only_its_file_moved(whole, model, server, tmp_path):
    import shutil

    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "judgements.jsonl").rename(folder / "judgements-old.jsonl")
    overrides = ("detect.judge.kind=model", f"detect.judge.model={model}")
    detect(config_of(tmp_path, model, server, *overrides), folder)
    content = json.loads((folder / "knowledge.json").read_text())
    assert content["judge"]["kind"] == "model" and content["judge"]["asked_as"] == "plain text"
    assert by_index(folder / "sequences.jsonl") == by_index(whole / "sequences.jsonl")


@pytest.mark.parametrize("words", [{" \n": 1.0}, {" ": 0.5, "\n\t": 0.5}])
def test_a_model_of_endless_whitespace_is_an_error(words, server, tmp_path):
    blank = unigram_model(tmp_path / "blank", words, end=0.0)
    asked = len(server.requests)
    needed = r"all 40 generated texts are empty or whitespace \(480 tokens in all\)"
    with pytest.raises(VersaTuneError, match=needed):
        detect(config_of(tmp_path, blank, server), tmp_path / "out")
    assert len(server.requests) == asked and not (tmp_path / "out" / "knowledge.json").exists()


def test_a_model_that_says_nothing_is_an_error(server, tmp_path):
    mute = unigram_model(tmp_path / "mute", {" law": 0.0}, end=1.0)
    with pytest.raises(VersaTuneError, match=r"empty or whitespace \(0 tokens in all\)"):
        detect(config_of(tmp_path, mute, server), tmp_path / "out")


def test_unparsable_answers_are_counted_and_take_no_part(model, tmp_path):
    def moody(text, number):
        words = text.split("=" * 20)[1].split()
        return chat({"maybe": 1.0}) if words[0] == "code" else judge_by_words(text, number)

    with JudgeServer(moody) as server:
        detect(config_of(tmp_path, model, server), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "knowledge.json").read_text())
    sequences = by_index(tmp_path / "out" / "sequences.jsonl")
    unparsable = sum(line["text"].split()[:1] == ["code"] for line in sequences.values())
    assert content["texts"]["unparsable"] == unparsable > 0
    assert content["texts"]["judged"] == 40 - content["texts"]["blank"] - unparsable
    assert sum(content["domains"].values()) == pytest.approx(1)


def test_a_judge_that_places_nothing_is_an_error(model, tmp_path):
    unplaced = pytest.raises(VersaTuneError, match=r"could place none of \d+ texts.*'maybe'")
    with JudgeServer(lambda *_: chat({"maybe": 1.0})) as server, unplaced:
        detect(config_of(tmp_path, model, server), tmp_path / "out")
    assert not (tmp_path / "out" / "knowledge.json").exists()


def test_a_key_that_is_missing_stops_before_anything_is_generated(model, server, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        detect(
            config_of(tmp_path, model, server, "detect.judge.endpoint.api_key_env=JUDGE_KEY"),
            tmp_path / "out",
        )
    assert not (tmp_path / "out" / "sequences.jsonl").exists()


def test_the_key_is_in_no_file(model, server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cr3t-k3y")
    config = config_of(tmp_path, model, server, "detect.judge.endpoint.api_key_env=JUDGE_KEY")
    detect(config, tmp_path / "out")
    assert any(headers.get("Authorization") == "Bearer s3cr3t-k3y" for headers in server.headers)
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 5 and not [file for file in files if b"s3cr3t" in file.read_bytes()]


def test_damaged_files_are_named(whole, model, server, tmp_path):
    import shutil

    config = config_of(tmp_path, model, server)
    for name, content in (
        ("sequences.jsonl", b'{"index": 0}\n{"index": 0}\n'),
        ("sequences.jsonl", b"garbage\n"),
        ("detection.json", b"{"),
    ):
        folder = shutil.copytree(whole, tmp_path / "copy")
        (folder / name).write_bytes(content)
        with pytest.raises(StateError, match=name):
            detect(config, folder)
        shutil.rmtree(folder)


def test_the_command_line_prints_where_the_result_lies(model, server, tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml", model, server.url)
    assert main(["detect", "--config", str(config), "detect.rounds=1"]) == 0
    path = tmp_path / "run" / "detect" / "knowledge.json"
    assert capsys.readouterr().out.strip() == str(path)
    picture = tmp_path / "both.png"
    assert main(["detect", "--compare", str(path), str(path), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["detect", "--compare", str(tmp_path / "none.json")]) == 3
    assert main(["detect", "--config", str(config), "--model", str(tmp_path)]) == 2
    assert f"{tmp_path}" in capsys.readouterr().err
