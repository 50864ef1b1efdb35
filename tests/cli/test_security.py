"""One small run from end to end: what it writes, who may read it, and what a forged checkpoint can do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launching import REPOSITORY
from small_runs import sample_settings

from versatune_ds.foundations.files import sha256_file

pytestmark = pytest.mark.slow

CANARY = "canary7f3e"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}A{'x' * 30}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}B{'x' * 30}",
    "WANDB_API_KEY": f"{CANARY}{'0' * 30}",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}C{'x' * 30}",
    "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
}


def run(*arguments: str, code: int = 0) -> str:
    """A verb in a process of its own with secrets in its environment, under umask 077."""
    done = subprocess.run(
        [sys.executable, "-m", "versatune_ds.cli.main", *arguments],
        env={**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=REPOSITORY,
        text=True,
        timeout=600,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        umask=0o077,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run of two steps in `run`, with data, cache, report and the console's text in `console`."""
    folder = tmp_path_factory.mktemp("security")
    raw = sample_settings(folder)
    raw["data"]["num_workers"] = 1
    raw["batch"] = {"pack_len": 192, "packs_per_step": 2}
    raw["train"] = {"max_steps": 2}
    raw["evaluation"] = {"every_n_steps": 2, "max_samples_per_domain": 2}
    raw["checkpoint"] = {"every_n_steps": 2}
    raw["metrics"] = {"tensorboard": True}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    console = [run(verb, "--config", str(config)) for verb in ("prepare", "train")]
    console.append(run("report", str(folder / "run")))
    (folder / "console").write_text("".join(console))
    return folder


def files(folder: Path) -> list[Path]:
    return [path for name in ("run", "cache") for path in (folder / name).rglob("*")]


def test_no_secret_of_the_environment_is_written_anywhere(folder):
    written = [path for path in [*files(folder), folder / "console"] if path.is_file()]
    assert {"resolved.yaml", "run.json", "report.html", "metrics.jsonl"} <= {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    leaks = [path for path in written if CANARY.encode() in path.read_bytes()]
    assert not leaks


def test_the_umask_decides_who_may_read(folder):
    open_to_others = [path for path in files(folder) if path.stat().st_mode & 0o077]
    assert not open_to_others


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_forged_checkpoint_runs_no_code(folder, tmp_path):
    """Whoever can write a shard can write its hash into the manifest, too."""
    run_dir, fired = tmp_path / "run", tmp_path / "fired"
    shutil.copytree(folder / "run", run_dir)
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    shard = next(checkpoint.glob("*optim_states.pt"))
    content = torch.load(shard, weights_only=False)
    torch.save({**content, "more": Bomb(fired)}, shard)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    unchanged = ["train", "--config", str(folder / "config.yaml"), f"run.dir={run_dir}", "train.max_steps=3"]
    assert "is damaged and not used" in run(*unchanged, code=4)
    manifest["files"][shard.name] = {"bytes": shard.stat().st_size, "sha256": sha256_file(shard)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    out = run(*unchanged, code=4)
    assert "holds more than tensors and was not loaded" in out and "Traceback" not in out
    out = run("export", str(run_dir), "--out", str(tmp_path / "model"), code=4)
    assert "holds more than tensors" in out
    assert not fired.exists()
    torch.load(shard, weights_only=False)
    assert fired.exists()  # it would have gone off


def test_the_report_shows_markup_in_any_text_as_text(folder, tmp_path):
    payload = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    run_dir = tmp_path / "run"
    shutil.copytree(folder / "run", run_dir, ignore=shutil.ignore_patterns("checkpoints", "model"))

    def poison(value):
        """Every text in it, and every key that is no field of ours, gets the payload."""
        if isinstance(value, dict):
            return {f"law{payload}" if key == "law" else key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        is_free = isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\dT", value)
        return value + payload if is_free and value not in ("samples", "tokens") else value

    for name in ("run.json", "metrics.jsonl", "weights.jsonl", "eval.jsonl"):
        lines = (run_dir / name).read_text().splitlines()
        parts = ["\n".join(lines)] if name == "run.json" else lines
        (run_dir / name).write_text("\n".join(json.dumps(poison(json.loads(part))) for part in parts) + "\n")
    skipped = {"step": 1, "reason": payload, "samples": [{"domain": payload, "sample": 1, "source": payload}]}
    (run_dir / "skipped_steps.jsonl").write_text(json.dumps(skipped) + "\n")
    run("report", str(run_dir))
    page = (run_dir / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page and "<img" not in page
