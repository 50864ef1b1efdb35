"""Log files keep whole lines only, can be cut back to a checkpoint, and never end a run."""

import errno
import json
import sys

import pytest

from versatune_ds.config.schema import Metrics
from versatune_ds.foundations.errors import StateError
from versatune_ds.observability import sinks as sinks_module
from versatune_ds.observability.sinks import MetricsLog, Sinks, flatten, open_sinks
from versatune_ds.observability.trackers import Tracker


@pytest.fixture
def warnings_seen(monkeypatch):
    """Texts of the module's warnings."""
    texts: list[str] = []
    monkeypatch.setattr(sinks_module.LOGGER, "warning", lambda text, *args: texts.append(text % args))
    return texts


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    assert steps_of(tmp_path / "m.jsonl") == [1]


def test_resume_replaces_the_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    offset = log.offset()
    assert offset == path.stat().st_size
    log.append({"step": 2, "old": True})
    log.append({"step": 3, "old": True})
    log.close()

    resumed = MetricsLog(path)
    assert resumed.truncate_to(offset) == 2
    resumed.append({"step": 2})
    assert steps_of(path) == [1, 2]
    assert "old" not in path.read_text()


def test_torn_last_line_is_cut_off_with_a_warning(tmp_path, warnings_seen):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    log = MetricsLog(path)
    log.append({"step": 2})
    assert steps_of(path) == [1, 2]
    assert len(warnings_seen) == 1 and "15 bytes were cut off" in warnings_seen[0]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path, warnings_seen):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step"')
    assert MetricsLog(path).offset() == 0
    assert path.read_text() == ""


def test_offset_of_another_file_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(StateError, match="offset 5 is not the end of a line"):
        MetricsLog(path).truncate_to(5)


def test_offset_beyond_the_end_keeps_the_file_and_warns(tmp_path, warnings_seen):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    assert MetricsLog(path).truncate_to(1000) == 0
    assert steps_of(path) == [1]
    assert "earlier lines are missing" in warnings_seen[0]


class FullDisk:
    """A file that takes `room` more bytes, then reports a full disk."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            self.file.write(data[: self.room])
            self.room = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_loses_lines_not_the_run(tmp_path, warnings_seen):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    assert log.append({"step": 1})
    disk = FullDisk(log._file, room=4)
    log._file = disk
    assert [log.append({"step": step}) for step in (2, 3, 4)] == [False, False, False]
    assert len(warnings_seen) == 1  # once, not for every step
    assert path.read_text() == '{"step": 1}\n'  # the four bytes of line 2 are gone again
    disk.room = 1000
    assert log.append({"step": 5})
    assert steps_of(path) == [1, 5]
    assert log.lost_lines == 3 and "3 lines are missing" in warnings_seen[1]


def test_missing_folder_is_an_error_at_the_start(tmp_path):
    with pytest.raises(StateError, match="cannot be written"):
        MetricsLog(tmp_path / "no" / "m.jsonl")


def test_sinks_write_all_files_and_resume_from_offsets(tmp_path, make_step):
    sinks = open_sinks(tmp_path, Metrics())
    sinks.step(make_step(1))
    sinks.weight_update({"step": 1, "after": {"law": 1.0}})
    offsets = sinks.offsets()
    sinks.step(make_step(2))
    sinks.skipped_step({"step": 2, "samples": [["law", 3]]})
    sinks.close()

    again = open_sinks(tmp_path, Metrics(), offsets=offsets, first_step=2)
    assert again.offsets() == offsets
    again.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert steps_of(tmp_path / "weights.jsonl") == [1]
    assert steps_of(tmp_path / "skipped_steps.jsonl") == []


def test_other_ranks_have_silent_sinks(tmp_path, make_step):
    sinks = Sinks()
    sinks.step(make_step(1))
    sinks.weight_update({"step": 1})
    assert sinks.offsets() == {}
    sinks.close()
    assert list(tmp_path.iterdir()) == []


def test_flatten_keeps_numbers_only():
    line = {"loss": 2.0, "skipped": True, "text": "x", "none": None, "weights": {"law": 0.5}, "list": [1]}
    assert flatten("train", line) == {
        "train/loss": 2.0,
        "train/skipped": 1.0,
        "train/weights/law": 0.5,
    }


def test_tensorboard_events(tmp_path, make_step):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(tmp_path, Metrics(tensorboard=True))
    sinks.step(make_step(1))
    sinks.step(make_step(2))
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, round(event.value, 4)) for event in events.Scalars("train/domain_loss/law")]
    assert points == [(1, 2.99), (2, 2.98)]
    assert "train/weights/code" in events.Tags()["scalars"]


def test_failing_tracker_is_reported_once_and_survived(tmp_path, make_step, warnings_seen):
    def broken(step, scalars):
        raise ConnectionError("no network")

    log = MetricsLog(tmp_path / "metrics.jsonl")
    sinks = Sinks({"metrics.jsonl": log}, [Tracker("Broken", broken, lambda: None)])
    for step in (1, 2, 3):
        sinks.step(make_step(step))
    assert len(warnings_seen) == 1 and "no network" in warnings_seen[0]
    sinks.close()
    assert "3 calls failed" in warnings_seen[1]
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch, make_step):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars["train/loss"]))

        def finish(self):
            calls.append("finish")

    class Wandb:
        @staticmethod
        def init(**settings):
            calls.append((settings["project"], settings["id"], settings["resume"]))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for _ in range(2):
        sinks = open_sinks(tmp_path, Metrics(wandb_project="p"))
        sinks.step(make_step(1))
        sinks.close()
    first, second = calls[0], calls[3]
    assert first == second and first[0] == "p" and first[2] == "allow"
    assert calls[1:3] == [(1, 3.99), "finish"]
