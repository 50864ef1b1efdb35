"""Benchmark tasks through lm-evaluation-harness (extra `eval`), in one process.

A model that is too large for one GPU is spread over all GPUs of the process, layer by layer. Each task is run
by itself: one that fails (no network, no such task) is reported and does not cost the scores of the others.

What is not covered: several ranks (refused), other backends of the harness such as vLLM, and the harness's
own result files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from versatune_ds.config.benchmarks import Benchmarks, Task
from versatune_ds.config.derive import model_of
from versatune_ds.config.model import Model
from versatune_ds.domain.evaluation import BenchmarkScore
from versatune_ds.engine.model.source import DTYPES
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

ALLOW_CODE_VARIABLE = "HF_ALLOW_CODE_EVAL"
"""What lm-evaluation-harness and Hugging Face's code_eval ask for before they run a model's programs."""
NOT_REACHED = "not reached: the evaluation was ended before"
NO_TASK = "lm-evaluation-harness has no task for it"


class Scores(NamedTuple):
    scores: tuple[BenchmarkScore, ...]
    not_run: dict[str, str]
    """Name of a benchmark without a score -> why."""


def check_benchmarks_can_run(benchmarks: Benchmarks) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        ConfigError: the harness is not installed, there are several ranks, or a task runs code unasked.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed: pip install 'versatune-ds[eval]'"
        )
    if distributed.world_size() > 1:
        raise ConfigError(
            "--tasks runs in one process (it spreads a large model over all GPUs of the machine): start "
            "`versatune-ds evaluate --tasks ...` without a launcher"
        )
    running_code = [task.name for task in benchmarks.tasks if task.runs_code and task.task is not None]
    if running_code and os.environ.get(ALLOW_CODE_VARIABLE) != "1":
        raise ConfigError(
            f"{', '.join(running_code)} run programs that the model wrote. Do that in a container only, and "
            f"allow it with {ALLOW_CODE_VARIABLE}=1, or take them out of the file"
        )


def run_benchmarks(
    source: str, benchmarks: Benchmarks, model: Model, device: torch.device, keep: Callable[[Scores], None]
) -> Scores:
    """Run all tasks on a model.

    Args:
        source: Hugging Face folder, adapter folder or hub name.
        model: for dtype and trust.
        keep: called after each task with what is known so far; tasks still to come stand in `not_run`.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = model_of(source)
    beside: dict[str, Any] = {"peft": source, "tokenizer": source} if found["adapter"] else {}
    lm = HFLM(
        pretrained=found["source"],
        **beside,
        device=str(device),
        dtype=DTYPES[model.dtype],
        batch_size=benchmarks.batch_size,
        trust_remote_code=model.trust_remote_code,
        parallelize=torch.cuda.device_count() > 1,
    )
    include = None if benchmarks.include is None else str(benchmarks.include)
    manager = TaskManager(include_path=include)
    scores: list[BenchmarkScore] = []
    not_run = {task.name: NOT_REACHED for task in benchmarks.tasks}
    for task in benchmarks.tasks:
        keep(Scores(tuple(scores), dict(not_run)))
        if task.task is None:
            not_run[task.name] = NO_TASK
            continue
        log.info("benchmark %s (%s)", task.name, task.task)
        try:
            scores.append(_run_task(lm, manager, task, benchmarks))
            del not_run[task.name]
        except Exception as error:  # the harness raises anything, from KeyError to errors of the data set
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, VersaTuneError):
                reason = str(error)
            log.error("benchmark %s failed: %s", task.name, reason)
            not_run[task.name] = reason
    return Scores(tuple(scores), not_run)


def _run_task(lm: Any, manager: Any, task: Task, benchmarks: Benchmarks) -> BenchmarkScore:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=lm,
        tasks=[task.task],
        task_manager=manager,
        num_fewshot=task.num_fewshot,
        limit=benchmarks.limit,
        apply_chat_template=benchmarks.chat_template,
        confirm_run_unsafe_code=task.runs_code,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert task.task is not None
    results = {**found["results"], **found.get("groups", {})}
    value, stderr = read_metric(results[task.task], task.metric)
    counts = found["n-samples"]
    parts = [counts[task.task]] if task.task in counts else list(counts.values())
    samples = sum(int(part["effective"]) for part in parts)
    return BenchmarkScore(task.task, task.name, task.domain, task.metric, value, stderr, samples)


def read_metric(result: Mapping[str, Any], metric: str) -> tuple[float, float | None]:
    """(value, standard error) of a metric in a harness result, whose keys are `metric,filter`.

    Raises:
        ConfigError: the task does not report the metric.
    """
    values = {}
    for key, value in result.items():
        name, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float):
            values[name, filter_name] = float(value)
    for (name, filter_name), value in values.items():
        if name == metric:
            return value, values.get((f"{metric}_stderr", filter_name))
    known = sorted({name for name, _ in values if not name.endswith("_stderr")})
    raise ConfigError(f"the task reports no metric {metric!r}; it has: {', '.join(known)}")
