"""The stages, one after the other, within the minutes that were given; the summary at the end.

A stage is a row of `STAGES`: another stage, or another variant of one, is another row.

    DIR/stage1_correctness.json   rewritten after every test
    DIR/stage2_kernel.json        after every measurement of the kernel benchmark
    DIR/stage3_trainer.json       after every process
    DIR/stage4_study.json         at its end; runs only where it is asked for
    DIR/summary.md                the summaries of all stages in DIR, those of earlier commands included

What is not covered: several GPUs or nodes; `versatune-ds bench` measures those.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import versatune_ds
from versatune_ds.apps.evidence.comparison import run_comparison
from versatune_ds.apps.evidence.correctness import run_correctness
from versatune_ds.apps.evidence.kernel import run_kernel
from versatune_ds.apps.evidence.record import KIND, Record, describe_machine
from versatune_ds.apps.evidence.study import run_study
from versatune_ds.apps.programs import Deadline
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import require_own, write_text_atomic

SUMMARY = "summary.md"


class Stage(NamedTuple):
    number: int
    name: str
    share: float
    """Of the minutes, when all stages run: it gets this part of what is left for it and those after it."""
    run: Callable[[Record, Deadline, Path | None, str], list[str]]
    """Fills the record until the deadline, from a checkout (None: an installed wheel), at a size."""
    is_extra: bool = False
    """Runs only where its number is given."""


STAGES = (
    Stage(1, "correctness", 0.3, run_correctness),
    Stage(2, "kernel", 0.2, run_kernel),
    Stage(3, "trainer", 0.5, run_comparison),
    Stage(4, "study", 1.0, run_study, is_extra=True),
)


def run_evidence(folder: Path, minutes: float, numbers: Sequence[int], size: str) -> str:
    """Run stages and write their files; returns the summary.

    Args:
        folder: made if it is not there; files of the same stages are replaced.
        minutes: the command ends within them.
        numbers: of the stages; empty: all but extra ones.
        size: "auto": by the card's memory, without a card "tiny"; "small": a larger comparison for CPUs.

    Raises:
        ConfigError: an unknown stage, or no time.
    """
    deadline = Deadline(60 * minutes)
    stages = [stage for stage in STAGES if (stage.number in numbers if numbers else not stage.is_extra)]
    unknown = sorted(set(numbers) - {stage.number for stage in STAGES})
    if unknown:
        raise ConfigError(
            f"evidence: no stage {unknown[0]} (known: {', '.join(str(s.number) for s in STAGES)})"
        )
    if minutes <= 0:
        raise ConfigError(f"evidence: --minutes is {minutes:g}; give a time above 0")
    signs = {f"stage{stage.number}_{stage.name}.json": f'"{KIND}"' for stage in stages}
    require_own(folder, signs | {SUMMARY: "# Evidence"})
    folder.mkdir(parents=True, exist_ok=True)
    checkout = find_checkout()
    environment = describe_machine()
    used = "tiny" if size == "auto" and environment["card"] is None else size
    for i, stage in enumerate(stages):
        path = folder / f"stage{stage.number}_{stage.name}.json"
        command = shlex.join(["versatune-ds", *sys.argv[1:]])
        record = Record(path, f"{stage.number} {stage.name}", environment | {"size": used}, command)
        print(f"stage {stage.number}: {stage.name} ({deadline.left_s():.0f} s left)", flush=True)
        own = Deadline(deadline.left_s() * stage.share / sum(later.share for later in stages[i:]))
        lines = stage.run(record, own, checkout, used)
        record.end(lines, "time is up" if own.left_s() == 0 else "done")
        write_text_atomic(folder / SUMMARY, summarise(folder))
    return summarise(folder)


def find_checkout() -> Path | None:
    """The source tree that this package lies in, None for an installed copy."""
    root = Path(versatune_ds.__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() else None


def summarise(folder: Path) -> str:
    """All stages in a folder as Markdown."""
    lines = ["# Evidence", ""]
    for path in sorted(folder.glob("stage*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("kind") != KIND:
            continue
        environment = value["environment"]
        card = environment["card"]
        where = environment["cpu"] if card is None else f"{card['name']}, driver {card['driver_version']}"
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        lines += [
            f"## Stage {value['stage']}",
            "",
            f"{environment['date']}, {where}, commit {environment['commit']}, {versions}; size "
            f"{environment['size']}; {value['ended'] or 'not finished'}.",
            "",
            *value["summary"],
            "",
        ]
    return "\n".join(lines)
