"""Tools outside of the run folder that draw scalars by step, each through its own package.

A resumed run goes on in the same tracker run, whose id lies in the run folder. Credentials and servers come
from the environment, as each package says, and never from the settings.

What is not covered: what happens when a call fails later (`sinks.py`), and points of steps that are done
again: TensorBoard hides them, W&B drops the new ones, the others keep both.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from versatune_ds.config.schema import Metrics
from versatune_ds.config.secrets import redacted
from versatune_ds.foundations.errors import ConfigError

MLFLOW_BATCH = 100
MLFLOW_VALUE_CHARS = 500
"""Most parameters in a call, and characters in a value, that every MLflow server takes."""


class Tracker(NamedTuple):
    """A tool that draws scalars by step."""

    name: str
    log: Callable[[int, Mapping[str, float]], Any]
    """Record scalars at a step."""
    close: Callable[[], Any]
    """Flush and end."""


class TrackedRun(NamedTuple):
    folder: Path
    project: str
    """As given in the settings: project or experiment."""
    first_step: int
    """The first one that will be recorded."""
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def arguments(self) -> dict[str, Any]:
        """What W&B and the packages like it are all told."""
        return {"project": self.project, "resume": "allow", "config": dict(self.config)}

    def kept_id(self, tool: str, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
        """The id of the tool's run, from the run folder; made there first."""
        file = self.folder / f"{tool}_id.txt"
        if not file.exists():
            file.write_text(make() + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


def tensorboard(run: TrackedRun) -> Tracker:
    """Events in `<run folder>/tensorboard`; what an earlier process wrote from `first_step` on is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    purge = run.first_step if run.first_step > 1 else None
    writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call]

    def log(step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return Tracker("TensorBoard", log, writer.close)


def wandb(run: TrackedRun) -> Tracker:
    """A Weights & Biases run. W&B drops steps below the newest that it has."""
    import wandb

    kept = run.kept_id("wandb")
    opened = wandb.init(**run.arguments, name=run.name, dir=str(run.folder), id=kept)
    return by_step("Weights & Biases", opened)


def by_step(name: str, opened: Any) -> Tracker:
    """A run of a package that logs and ends as W&B's do."""
    return Tracker(name, lambda step, scalars: opened.log(dict(scalars), step=step), opened.finish)


def mlflow(run: TrackedRun) -> Tracker:
    """A run of an MLflow experiment, which is made if it is not there; the server is MLFLOW_TRACKING_URI."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()

    def make() -> str:
        experiment = client.get_experiment_by_name(run.project)
        kept = client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        made = str(client.create_run(kept, run_name=run.name).info.run_id)
        params = [Param(key, value[:MLFLOW_VALUE_CHARS]) for key, value in flat_settings(run.config).items()]
        for start in range(0, len(params), MLFLOW_BATCH):
            client.log_batch(made, params=params[start : start + MLFLOW_BATCH])
        return made

    kept = run.kept_id("mlflow", make)
    client.update_run(kept, status="RUNNING")

    def log(step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(allowed(name), value, now, step) for name, value in scalars.items()]
        client.log_batch(kept, metrics=metrics)

    return Tracker("MLflow", log, lambda: client.set_terminated(kept))


def allowed(name: str) -> str:
    """A metric's name with the characters that MLflow takes."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def flat_settings(value: Any, prefix: str = "") -> dict[str, str]:
    """Settings as `section.key` -> text."""
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    parts = (flat_settings(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: text for part in parts for key, text in part.items()}


def swanlab(run: TrackedRun) -> Tracker:
    """A SwanLab run; SWANLAB_MODE says where to."""
    import swanlab

    kept = run.kept_id("swanlab")
    opened = swanlab.init(**run.arguments, name=run.name, log_dir=str(run.folder / "swanlab"), id=kept)
    return by_step("SwanLab", opened)


def trackio(run: TrackedRun) -> Tracker:
    """A Trackio run, in TRACKIO_DIR or the Space TRACKIO_SPACE_ID. Trackio tells runs apart by name."""
    import trackio

    name = run.kept_id("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}")
    settings: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
    opened = trackio.init(**run.arguments, name=name, **settings)
    return by_step("Trackio", opened)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb_project": wandb,
    "mlflow_experiment": mlflow,
    "swanlab_project": swanlab,
    "trackio_project": trackio,
}
"""By their setting in `Metrics`; each function is called as its package is."""


def wanted_trackers(settings: Metrics) -> dict[str, Callable[[TrackedRun], Tracker]]:
    """Those of TRACKERS that are asked for."""
    return {name: tracker for name, tracker in TRACKERS.items() if getattr(settings, name)}


def open_trackers(
    run_dir: Path, settings: Metrics, first_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """All trackers that are asked for; ConfigError where one cannot be started."""
    opened = []
    for name, tracker in wanted_trackers(settings).items():
        try:
            opened.append(tracker(TrackedRun(run_dir, str(getattr(settings, name)), first_step, config)))
        except Exception as error:
            raise ConfigError(
                f"metrics.{name}: it cannot be started ({type(error).__name__}: {redacted(str(error))}); see "
                "what its package wants in the environment, or leave it out"
            ) from None
    return opened
