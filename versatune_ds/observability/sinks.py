"""Where records go: append-only JSONL files (the ground truth), and trackers (`trackers.py`).

`MetricsLog` writes each line whole and hands it to the operating system before it returns, so a killed
process loses nothing and a reader of a running run sees every line. On resume the file is cut back to the
offset in the checkpoint: lines of steps that will be done again are replaced, never doubled.

A log must not end a training run. When a line cannot be written (a full disk), what was written of it is
cut off again, the loss is reported once and counted, and training goes on; the first line that succeeds
afterwards reports how many are missing. The same holds for trackers. Errors at start-up (folder
not writable, package missing) do stop the run: nothing is lost yet.

What is not covered: what a record holds (`records`), the console (`progress`). Only rank 0 has files;
`Sinks()` without arguments is the silent one for the other ranks.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from versatune_ds.config.schema import Metrics
from versatune_ds.config.secrets import redacted
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import writing
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.records import EvalRecord, StepRecord, clean, json_line
from versatune_ds.observability.trackers import Tracker, open_trackers

LOGGER = get_logger(__name__)
COPY_BLOCK_BYTES = 1 << 20


class MetricsLog:
    """Append-only file of JSON lines.

    Opening an existing file keeps its lines. A last line without an end (the process was killed, or the
    machine lost power) is cut off with a warning.

    Args:
        path: the file; made when absent, its folder must exist.

    Raises:
        StateError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.lost_lines = 0
        """Lines that could not be written since the log was opened."""
        self._lost_in_a_row = 0
        with writing(self.path, "the run folder must be writable"):
            mode = "r+b" if self.path.exists() else "x+b"
            self._file = open(self.path, mode, buffering=0)  # noqa: SIM115 - lives as long as the log
        self._end = self._repair_torn_line()

    def _repair_torn_line(self) -> int:
        """Cut the file after its last newline; return the offset of its end."""
        size, end = self._file.seek(0, os.SEEK_END), 0
        if size:  # an empty file cannot be mapped
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
                end = lines.rfind(b"\n") + 1
        if end < size:
            LOGGER.warning(
                "%s: its last line was incomplete (the run was killed while writing it); "
                "%d bytes were cut off",
                self.path,
                size - end,
            )
            self._file.truncate(end)
        return end

    def append(self, value: Mapping[str, Any]) -> bool:
        """Write one line; False when it is lost (then reported and counted, see the module's text)."""
        data = json_line(value).encode("utf-8")
        try:
            # A previous failure may have left part of a line behind the end, or none: cut there first.
            if self._lost_in_a_row:
                self._file.truncate(self._end)
            self._file.seek(self._end)
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            self._lose(error)
            return False
        self._end += len(data)
        if self._lost_in_a_row:
            LOGGER.warning("%s: writing works again; %d lines are missing", self.path, self._lost_in_a_row)
            self._lost_in_a_row = 0
        return True

    def _lose(self, error: OSError) -> None:
        """Count a lost line, report the first of a row, and try to leave no half line behind."""
        self.lost_lines += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row == 1:
            LOGGER.warning(
                "%s: a line could not be written (%s); training goes on without it, and the number "
                "of missing lines follows when writing works again",
                self.path,
                error.strerror or error,
            )
        try:
            self._file.truncate(self._end)
        except OSError:
            return  # the next append cuts, and reports if it cannot

    def offset(self) -> int:
        """Bytes of all whole lines; everything before it is on disk when this returns."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            LOGGER.warning("%s: fsync failed (%s)", self.path, error.strerror)
        return self._end

    def truncate_to(self, offset: int) -> int:
        """Cut the file back to `offset`, a value that `offset()` gave earlier; return the lines removed.

        A file that is shorter already (somebody removed lines) is kept as it is, with a warning.

        Raises:
            StateError: `offset` is negative or not at the end of a line, so the file is not the one
                that the checkpoint was made with.
        """
        if offset > self._end:
            LOGGER.warning(
                "%s holds %d bytes, the checkpoint knows of %d: earlier lines are missing",
                self.path,
                self._end,
                offset,
            )
            return 0
        if offset < 0 or not self._is_line_end(offset):
            raise StateError(
                f"{self.path}: the checkpoint's offset {offset} is not the end of a line, so this is not "
                "the file that was written with the checkpoint; move it away to start a new one"
            )
        self._file.seek(offset)
        removed = 0
        while block := self._file.read(COPY_BLOCK_BYTES):
            removed += block.count(b"\n")
        self._file.truncate(offset)
        self._end = offset
        return removed

    def _is_line_end(self, offset: int) -> bool:
        if offset == 0:
            return True
        self._file.seek(offset - 1)
        return self._file.read(1) == b"\n"

    def close(self) -> None:
        """Close the file and report lost lines, if any."""
        if self._file.closed:
            return
        self._file.close()
        if self.lost_lines:
            LOGGER.warning("%s: %d lines in all could not be written", self.path, self.lost_lines)


def flatten(prefix: str, line: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a JSON line as `prefix/key` or `prefix/key/name...`; null, text and lists are left."""
    flat: dict[str, float] = {}
    for key, value in clean(line).items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(name, value))
        elif isinstance(value, bool | int | float):
            flat[name] = float(value)
    return flat


class Sinks:
    """All places that records go to; the engine talks to this object only.

    Args:
        logs: file name -> open log. Empty on ranks other than 0: then every method does nothing.
    """

    def __init__(
        self, logs: Mapping[str, MetricsLog] | None = None, trackers: list[Tracker] | None = None
    ) -> None:
        self._logs = dict(logs or {})
        self._trackers = list(trackers or [])
        self._tracker_failures: dict[str, int] = {}

    def step(self, record: StepRecord) -> None:
        """Record an optimizer step: metrics.jsonl and the trackers."""
        self._record(constants.METRICS_FILE, "train", record.to_json())

    def evaluation(self, record: EvalRecord) -> None:
        """Record an evaluation: eval.jsonl and the trackers."""
        self._record(constants.EVAL_FILE, "eval", record.to_json())

    def answers(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Record what the model answered at an evaluation: answers.jsonl."""
        for line in lines:
            self._append(constants.ANSWERS_FILE, line)

    def weight_update(self, line: Mapping[str, Any]) -> None:
        """Record a weight update (`WeightUpdate.to_json()`): weights.jsonl and the trackers."""
        self._record(constants.WEIGHTS_FILE, "weights", line)

    def skipped_step(self, line: Mapping[str, Any]) -> None:
        """Record what a skipped step was made of: skipped_steps.jsonl."""
        self._append(constants.SKIPPED_STEPS_FILE, line)

    def offsets(self) -> dict[str, int]:
        """File name -> bytes, for the checkpoint; the bytes before are on disk when this returns."""
        return {name: log.offset() for name, log in self._logs.items()}

    def close(self) -> None:
        """Close files and trackers; a tracker that fails is reported and does not hide the others."""
        for log in self._logs.values():
            log.close()
        for tracker in self._trackers:
            self._guard(tracker, tracker.close)
        for name, count in self._tracker_failures.items():
            LOGGER.warning("%s: %d calls failed in all", name, count)
        self._trackers = []

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._logs:
            self._logs[name].append(line)

    def _record(self, name: str, prefix: str, line: Mapping[str, Any]) -> None:
        """A line of a file, and its numbers by step for the trackers."""
        self._append(name, line)
        numbers = {key: value for key, value in line.items() if key not in ("step", "unix_time_s")}
        scalars = flatten(prefix, numbers) if self._trackers else {}
        for tracker in self._trackers:
            self._guard(tracker, functools.partial(tracker.log, line["step"], scalars))

    def _guard(self, tracker: Tracker, call: Callable[[], None]) -> None:
        """Run a tracker's call; its failure (network, disk) is reported once, counted, and survived."""
        try:
            call()
        except Exception as error:
            failures = self._tracker_failures.get(tracker.name, 0)
            self._tracker_failures[tracker.name] = failures + 1
            if failures == 0:
                LOGGER.warning(
                    "%s failed (%s: %s); training goes on, further failures are counted",
                    tracker.name,
                    type(error).__name__,
                    redacted(str(error)),
                )


LOG_FILES = (
    constants.METRICS_FILE,
    constants.WEIGHTS_FILE,
    constants.EVAL_FILE,
    constants.ANSWERS_FILE,
    constants.SKIPPED_STEPS_FILE,
)


def open_sinks(
    run_dir: Path,
    settings: Metrics,
    *,
    offsets: Mapping[str, int] | None = None,
    first_step: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Sinks:
    """Open all sinks of a run; call on rank 0 only (other ranks take `Sinks()`).

    Args:
        settings: section `metrics` of the configuration; preflight saw to the packages that it needs.
        offsets: `Sinks.offsets()` from the checkpoint that the run goes on from; lines behind them are
            removed and will be written again. None starts a new run: existing lines, left by a run that
            made no checkpoint, are removed too.
        first_step: number of the first step that will be recorded.

    Raises:
        ConfigError: a tracker cannot be started.
        StateError: a file cannot be written, or does not fit the checkpoint.
    """
    trackers = open_trackers(run_dir, settings, first_step, config or {})
    logs: dict[str, MetricsLog] = {}
    for name in LOG_FILES:
        log = MetricsLog(Path(run_dir) / name)
        removed = log.truncate_to((offsets or {}).get(name, 0))
        if removed:
            LOGGER.info("%s: %d lines after the checkpoint will be replaced", log.path, removed)
        logs[name] = log
    return Sinks(logs, trackers)
