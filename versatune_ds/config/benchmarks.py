"""A file of benchmark tasks for `versatune-ds evaluate --tasks`: which task stands for which domain.

What is not covered: running them (`apps/evaluate/lm_eval.py`), and what a task is: lm-evaluation-harness
says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from versatune_ds.config.load import read_yaml, validate_settings
from versatune_ds.config.section import Place, Section
from versatune_ds.foundations.errors import ConfigError, unknown_name


class Task(Section):
    """One benchmark."""

    task: str | None
    """Name of a task or group of lm-evaluation-harness, or of a task file in `include`. null: the benchmark
    is only named, and reported as not run."""
    name: str
    """What people call it."""
    domain: str
    """Domain that it measures."""
    metric: str
    """Metric to report, as the harness calls it: acc, acc_norm, exact_match, ..."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in the prompt; null: as the task says."""
    runs_code: bool = False
    """The task runs programs that the model wrote; refused unless HF_ALLOW_CODE_EVAL=1 is set."""


class Benchmarks(Section):
    """A benchmark file."""

    include: Place | None = None
    """Folder with task files of your own, relative to this file; they work without network if their data are
    local."""
    batch_size: int = Field(8, ge=1)
    """Requests in a forward pass."""
    limit: int | None = Field(None, ge=1)
    """Use the first n items of each task only; for a quick look, scores are then rough."""
    chat_template: bool = False
    """Put prompts into the model's chat template."""
    tasks: list[Task] = Field(min_length=1)
    """The benchmarks, in the order of tables and charts."""


def load_benchmarks(path: Path, names: Sequence[str]) -> Benchmarks:
    """Read a benchmark file.

    Raises:
        ConfigError: it is missing, not YAML, has unknown keys or domains, or names a task twice.
    """
    raw = read_yaml(path, "--tasks names it; ready ones: configs/benchmarks/")
    found = validate_settings(Benchmarks, raw, str(path))
    tasks = [task.task for task in found.tasks if task.task is not None]
    for task in found.tasks:
        if task.domain not in names:
            raise ConfigError(f"{path}: {task.name}: {unknown_name('domain', task.domain, names)}")
        if tasks.count(task.task or "") > 1:
            raise ConfigError(f"{path}: the task {task.task} stands twice")
    if found.include is None:
        return found
    include = path.parent / found.include
    if not include.is_dir():
        raise ConfigError(f"{path}: include names {include}, which is not a folder")
    return found.model_copy(update={"include": include})
