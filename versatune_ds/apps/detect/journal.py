"""An append-only file of JSON lines, one per text, that a killed run goes on from.

Every line has an `index`. Blocks of lines are written, flushed and synced together; a last line that a kill
left without its end is cut off with a warning. A line that cannot be written stops the run (compare
`observability.sinks.MetricsLog`, which must not stop a training run): what is not on disk was not done.
detection.json, beside the journals, says what their lines were made with; `open_journal` refuses to mix.

What is not covered: which lines are needed (`run.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from versatune_ds.engine.provenance import changed_settings
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import write_json_atomic, writing
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

DETECTION_FILE = "detection.json"


class Journal:
    """Lines by index; opening an existing file reads them.

    Args:
        path: the file; made when absent, its folder must exist.

    Raises:
        StateError: the file cannot be written, a line before the last is damaged, or an index stands twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path, "give another folder"):
            mode = "r+b" if path.exists() else "x+b"
            self._file = open(path, mode)  # noqa: SIM115 - lives as long as the journal
        self.lines: dict[int, dict[str, Any]] = {}
        """Index -> line."""
        self._read()

    def _read(self) -> None:
        for number, data in enumerate(self._file, start=1):
            if not data.endswith(b"\n"):
                log.warning(
                    "%s: its last line was incomplete (the run was killed while writing it); %d bytes were "
                    "cut off and the text is made again",
                    self.path,
                    len(data),
                )
                self._file.truncate(self._file.tell() - len(data))
                break
            try:
                line = json.loads(data)
                index = line["index"]
            except (ValueError, KeyError, TypeError):
                raise StateError(
                    f"{self.path}:{number}: not a line that this program wrote; move the file away to start "
                    "this step again"
                ) from None
            if index in self.lines:
                raise StateError(
                    f"{self.path}:{number}: index {index} stands twice; was the run started twice at the "
                    "same time? Move the file away to start this step again"
                )
            self.lines[index] = line
        self._file.seek(0, os.SEEK_END)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines with new indices; they are on disk when this returns."""
        for line in lines:
            assert line["index"] not in self.lines
            self.lines[line["index"]] = dict(line)
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with writing(self.path, "make room and start the same command again"):
            self._file.write(text.encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_detection(folder: Path) -> dict[str, Any]:
    """Content of detection.json; empty when there is none."""
    path = folder / DETECTION_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateError(f"{path}: not JSON ({error}); move the folder away to start again") from None
    return dict(content)


def open_journal(folder: Path, name: str, what: str, wanted: dict[str, Any]) -> Journal | None:
    """The journal of a step on rank 0 (None elsewhere), for lines made with `wanted` and no others.

    Raises:
        StateError: the file holds lines that were made with other settings.
    """
    if not distributed.is_main():
        return None
    content = read_detection(folder)
    journal = Journal(folder / name)
    changed = changed_settings(content.get(what) or {}, wanted)
    if journal.lines and changed:
        journal.close()
        differences = "; ".join(f"{key} was {was!r} and is now {now!r}" for key, was, now in changed)
        raise StateError(
            f"{journal.path} was made with other settings: {differences}. Give another folder with --out, or "
            f"move {name} away to do this step again"
        )
    write_json_atomic(folder / DETECTION_FILE, {**content, what: wanted})
    return journal
