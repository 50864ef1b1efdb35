"""The benchmark of `prepare`: both sides tokenise the same rows, and the numbers say where they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import REPOSITORY
from prepared import data_config, pairs, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.bench import prepare as bench_prepare
from versatune_ds.config.load import write_resolved

CHAT = [("system", "Be short."), ("user", "Name a prime."), ("assistant", "Seven."), ("user", "And?")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": r, "content": c} for r, c in [*CHAT, ("assistant", f"{i}")]]} for i in range(9)
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "a"}], "system": "S"}
        for i in range(9)
    ],
    "alpaca": [{"instruction": f"question {i}", "input": "x" * (i % 2), "output": "a"} for i in range(9)],
    "mapped": [{"question": row["prompt"], "completion": row["completion"]} for row in pairs(9)],
}


def bench(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> subprocess.CompletedProcess[str]:
    qwen_like_tokenizer().save_pretrained(folder / "tokenizer")
    sources: list[dict[str, Any]] = [
        {"path": str(write_jsonl(folder / f"{name}.jsonl", made)), "domain": "law"}
        for name, made in rows.items()
    ]
    sources[-1]["columns"] = {"prompt": "question"}
    held_out = [{"path": str(write_jsonl(folder / "held_out.jsonl", pairs(2, start=50))), "domain": "law"}]
    config = data_config(folder, folder / "tokenizer", sources, eval=held_out, num_workers=2)
    write_resolved(config, folder / "config.yaml")
    command = [
        sys.executable,
        "-m",
        "versatune_ds.apps.bench.prepare",
        "--config",
        str(folder / "config.yaml"),
    ]
    return subprocess.run(
        [*command, "--rounds", "1", "--json", str(folder / "result.json"), "batch.pack_len=1024"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_both_sides_are_measured_on_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra `hub`")
    done = bench(tmp_path, ROWS)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["processes"], result["files"], len(result["rounds"])) == (2, 4, 1)
    (measured,) = result["rounds"]
    assert measured["prepare"]["tokens"] == measured["datasets"]["tokens"] == result["tokens"] > 500
    for name in ("wall", "cpu"):
        ratio = measured["datasets"][f"{name}_s"] / measured["prepare"][f"{name}_s"]
        assert result[f"{name}_ratio"] == pytest.approx(ratio)
    assert {"date", "cpu", "commit", "versions"} <= set(result["environment"])
    assert not (tmp_path / "cache").exists(), "the user's own caches are left alone"


def test_sides_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"prepare": {"tokens": 7, "wall_s": 1.0}, "datasets": {"tokens": 8, "wall_s": 2.0}}
    assert bench_prepare.compare([made], "wall_s") == 2
    with pytest.raises(SystemExit, match="nothing is compared"):
        bench_prepare.require_same_tokens([made])


def test_a_round_that_fails_leaves_those_before_it(monkeypatch, tmp_path):
    sides = iter(["prepare", "datasets"])

    def measure(side, *arguments):
        if next(sides, None) is None:
            raise SystemExit("the machine is gone")
        return {"tokens": 7, "wall_s": 1.0, "cpu_s": 2.0, "load_average": 0.0}

    monkeypatch.setattr(bench_prepare, "measure", measure)
    monkeypatch.setattr(
        bench_prepare, "training_data", lambda *a: SimpleNamespace(data=SimpleNamespace(num_workers=1))
    )
    monkeypatch.setattr(bench_prepare, "source_files", lambda config: [])
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench_prepare.py", "--config", "x.yaml", "--json", str(target)])
    with pytest.raises(SystemExit, match="the machine is gone"):
        bench_prepare.main()
    result = json.loads(target.read_text())
    assert len(result["rounds"]) == 1 and result["wall_ratio"] == 1.0
