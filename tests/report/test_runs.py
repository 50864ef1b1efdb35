"""Run folders are read as they are: killed, running, incomplete; other folders are refused."""

import json

import numpy as np
import pytest

from versatune_ds.foundations.errors import StateError
from versatune_ds.report.runs import distinct_labels, read_run, read_runs, smooth


def test_arrays_hold_the_recorded_numbers(make_run):
    run = read_run(make_run(steps=3))
    assert run.names == ("law", "code")
    assert run.steps.tolist() == [1, 2, 3]
    assert run.series["loss"].tolist() == [3.99, 3.98, 3.97]
    assert run.domain_series["domain_loss"][:, 1].tolist() == [3.99, 3.98, 3.97]
    assert run.domain_series["weights"].tolist() == [[0.5, 0.5]] * 3
    assert run.shares["tokens"].tolist() == [[0.5, 0.5]] * 3
    assert run.eval_domain_loss.tolist() == [[5.25, 6.25], [2.125, 3.125]]
    assert run.updates["gamma"].tolist() == [[0.25, 0.25]]
    assert [(alarm.step, alarm.kind) for alarm in run.alarms] == [(10, "alarm"), (10, "note")]
    assert run.notes == ()


def test_torn_and_bad_lines_are_left_out_with_a_note(make_run):
    folder = make_run(steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    run = read_run(folder)
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(run.series["step_s"][3]) and np.isnan(run.domain_series["weights"][3]).all()
    assert any("last line (6) is incomplete" in note for note in run.notes)
    assert any("line 4 is not a record" in note for note in run.notes)


def test_the_later_of_two_lines_of_a_step_counts(make_run):
    folder = make_run(steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1.5}\n')
    run = read_run(folder)
    assert run.series["loss"].tolist() == [3.99, 1.5, 3.97]
    assert any("more than once" in note for note in run.notes)


def test_a_run_without_any_step_yet(make_run):
    run = read_run(make_run(steps=0, evaluations=False, updates=False))
    assert len(run.steps) == 0 and run.domain_series["weights"].shape == (0, 2)


def test_domains_come_from_the_records_when_run_json_is_missing(make_run):
    folder = make_run()
    (folder / "run.json").unlink()
    run = read_run(folder)
    assert run.names == ("law", "code")
    assert any("run.json is missing" in note for note in run.notes)


def test_broken_run_json_is_a_note(make_run):
    folder = make_run()
    (folder / "run.json").write_text("{broken")
    assert any("run.json cannot be read" in note for note in read_run(folder).notes)


def test_missing_folder(tmp_path):
    with pytest.raises(StateError, match="does not exist"):
        read_run(tmp_path / "nowhere")


def test_a_folder_of_runs_names_them(make_run, tmp_path):
    make_run("first")
    with pytest.raises(StateError, match=r"not a run folder.*runs inside it: first"):
        read_run(tmp_path)


def test_a_file_without_any_record_is_refused(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").write_text("loss,step\n1,2\n")
    with pytest.raises(StateError, match="none of its 2 lines"):
        read_run(folder)


def test_the_same_run_twice_is_refused(make_run):
    folder = make_run()
    with pytest.raises(StateError, match="given twice"):
        read_runs([folder, folder])


def test_labels_differ(tmp_path):
    assert distinct_labels([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert distinct_labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


def test_weight_lines_may_be_lists_in_table_order(make_run):
    folder = make_run(updates=False)
    line = {"step": 5, "gamma": [0.5, None], "phi": [0.0, 0.25], "before": [0.5, 0.5], "after": [0.6, 0.4]}
    (folder / "weights.jsonl").write_text(json.dumps(line) + "\n")
    run = read_run(folder)
    assert run.updates["phi"].tolist() == [[0.0, 0.25]]
    assert run.updates["gamma"][0, 0] == 0.5 and np.isnan(run.updates["gamma"][0, 1])


def test_smoothing_adds_sums_and_divides_once():
    loss = np.array([1.0, 3.0, np.nan, 5.0])
    tokens = np.array([100.0, 300.0, 50.0, 100.0])
    # window 2: 1; (100 + 900) / 400 = 2.5; 3 (the NaN has no part); 5
    assert smooth(loss, 2, tokens).tolist() == [1.0, 2.5, 3.0, 5.0]
    assert np.isnan(smooth(np.full(3, np.nan), 2)).all()
