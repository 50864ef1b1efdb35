"""Trackers get every number, go on in the same run after a resume, and never see or say a secret.

The stand-ins take the arguments that the packages publish (mlflow-skinny 3.17, swanlab 0.10, trackio 0.43);
tests with the packages themselves skip where they are not installed.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from versatune_ds.config.schema import Metrics
from versatune_ds.config.secrets import redacted
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability import sinks as sinks_module
from versatune_ds.observability.sinks import open_sinks
from versatune_ds.observability.trackers import allowed, flat_settings

CONFIG = {"optimizer": {"lr": 1e-5}, "domains": {"names": ["law", "code"]}}


def record(folder, make_step, steps, **settings):
    """A process that records these steps."""
    sinks = open_sinks(folder, Metrics(**settings), first_step=steps[0], config=CONFIG)
    for step in steps:
        sinks.step(make_step(step))
    sinks.close()


@pytest.fixture
def stand_in(monkeypatch):
    """Installs a module of this name with these attributes."""

    def install(name, **attributes):
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def init_of(opened):
    """`init` as SwanLab's and Trackio's; notes what it was called with, and each call of the run."""

    def init(*, project, name, id=None, resume, config, log_dir=None, **options):
        assert config == CONFIG and set(options) <= {"auto_log_gpu", "auto_log_cpu", "embed"}
        calls = []
        opened.append(((project, id or name, resume), calls))
        return SimpleNamespace(
            log=lambda data, step: calls.append((step, data["train/loss"], data["train/domain_loss/law"])),
            finish=lambda: calls.append("finish"),
        )

    return init


@pytest.mark.parametrize("tool", ["swanlab", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_one(tool, tmp_path, make_step, stand_in):
    opened = []
    stand_in(tool, init=init_of(opened))
    for steps in ([1, 2], [3]):
        record(tmp_path, make_step, steps, **{f"{tool}_project": "p"})
    (first, calls), (second, more) = opened
    assert first == second and first[0] == "p" and first[2] == "allow"
    assert calls == [(1, 3.99, 2.99), (2, 3.98, 2.98), "finish"] and more == [(3, 3.97, 2.97), "finish"]
    assert (tmp_path / f"{tool}_id.txt").read_text().strip() == first[1]


def test_mlflow_goes_on_in_the_same_run(tmp_path, make_step, stand_in):
    runs, points, said = {}, [], []

    class Client:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="7") if runs else None

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment_id, run_name):
            assert experiment_id == "7"
            runs[f"id{len(runs)}"] = {}
            return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(runs) - 1}"))

        def update_run(self, run_id, status):
            said.append((run_id, status))

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(params) <= 100
            runs[run_id].update(params)
            points.extend((key, step) for key, _, _, step in metrics if key == "train/loss")

        def set_terminated(self, run_id):
            said.append((run_id, "FINISHED"))

    stand_in("mlflow", MlflowClient=Client)
    stand_in("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    for steps in ([1, 2], [3]):
        record(tmp_path, make_step, steps, mlflow_experiment="p")
    assert list(runs) == ["id0"] and runs["id0"]["optimizer.lr"] == "1e-05"
    assert points == [("train/loss", 1), ("train/loss", 2), ("train/loss", 3)]
    assert said == [("id0", "RUNNING"), ("id0", "FINISHED")] * 2


def test_names_and_settings_for_mlflow():
    assert allowed("train/domain_loss/C++ (new)") == "train/domain_loss/C__ _new_"
    assert flat_settings(CONFIG) == {"optimizer.lr": "1e-05", "domains.names": "['law', 'code']"}


@pytest.mark.parametrize("when", ["init", "log"])
def test_no_secret_in_what_is_said(when, tmp_path, make_step, stand_in, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "Zq81-secret-value")
    said = []
    monkeypatch.setattr(sinks_module.LOGGER, "warning", lambda text, *args: said.append(text % args))

    def fail(*args, **options):
        raise ConnectionError("401 for key Zq81-secret-value at https://me:pa55word@host/x")

    run = SimpleNamespace(log=fail, finish=lambda: None)
    stand_in("swanlab", init=fail if when == "init" else lambda **options: run)
    if when == "init":
        with pytest.raises(ConfigError, match=r"metrics.swanlab_project: it cannot be started") as error:
            record(tmp_path, make_step, [1], swanlab_project="p")
        said.append(str(error.value))
    else:
        record(tmp_path, make_step, [1], swanlab_project="p")
    assert "401" in said[0] and not any("Zq81" in text or "pa55word" in text for text in said)


def test_short_values_and_plain_texts_stay(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "on")
    assert redacted("on https://host/x with hf_" + "a" * 34) == "on https://host/x with ***"


def test_real_mlflow(tmp_path, make_step, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for steps in ([1, 2], [3]):
        record(tmp_path, make_step, steps, mlflow_experiment="p")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 3.99), (2, 3.98), (3, 3.97)]
    assert run.data.params["optimizer.lr"] == "1e-05" and run.info.status == "FINISHED"


def test_real_trackio(tmp_path, make_step, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for steps in ([1, 2], [3]):
        record(tmp_path, make_step, steps, trackio_project="p")
    assert len(SQLiteStorage.get_runs("p")) == 1
    logs = SQLiteStorage.get_logs("p", (tmp_path / "trackio_id.txt").read_text().strip())
    assert [(line["step"], line["train/loss"]) for line in logs] == [(1, 3.99), (2, 3.98), (3, 3.97)]


def test_real_swanlab(tmp_path, make_step, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for steps in ([1, 2], [3]):
        record(tmp_path, make_step, steps, swanlab_project="p")
    written = [path for path in (tmp_path / "swanlab").rglob("*") if path.is_file()]
    assert len(written) >= 2 and json.dumps(CONFIG)  # offline a second process writes files of its own
