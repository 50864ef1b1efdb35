"""The commands a user types, from raw files to a model and a report, under the real launcher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY, read_jsonl, run_command

pytestmark = pytest.mark.slow
DOMAINS = ["law", "medicine", "finance", "science", "code", "other"]


def test_the_sample_from_raw_files_to_model_and_report(tmp_path):
    """launch/quickstart.sh as it is, in a folder of its own, with fewer steps in its settings."""
    folder = tmp_path / "checkout"
    (folder / "configs").mkdir(parents=True)
    for shared in ("launch", "configs/deepspeed"):
        (folder / shared).symlink_to(REPOSITORY / shared)
    config = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    config["train"] = {"max_steps": 12}
    for section in ("weights", "evaluation", "checkpoint"):
        config[section]["every_n_steps"] = 4 if section == "weights" else 6
    path = Path("configs") / "quickstart.yaml"
    (folder / path).write_text(yaml.safe_dump(config))
    run_dir = Path("runs") / "quickstart"
    command = ("deepspeed", "--num_gpus", "2", "launch/train.py", "--config", str(path))
    run_command("versatune-ds", "sample", "runs/sample", cwd=folder)
    assert f"versatune-ds prepare --config {path}" in run_command(*command, cwd=folder, code=4)
    out = run_command("bash", "launch/quickstart.sh", cwd=folder)
    assert all(f"{domain} " in out for domain in DOMAINS)  # of `prepare`
    assert re.search(r"^loss: (chunked|triton) \(auto: .+\)$", out, re.MULTILINE)
    assert "weights after step 4" in out and "step 12/12" in out
    assert out.splitlines()[-2:] == [f"model:  {run_dir}/model", f"report: {run_dir}/report.html"]
    assert (folder / run_dir / "model" / "model.safetensors").is_file()
    page = (folder / run_dir / "report.html").read_text()
    assert "resuming from" in run_command(*command, cwd=folder)
    assert len(read_jsonl(folder / run_dir / "metrics.jsonl")) == 12
    earlier = str(run_dir / "checkpoints" / "step-00000006")
    compared = run_command(
        "versatune-ds", "evaluate", "--config", str(path), "--against", earlier, cwd=folder
    )
    assert "forgotten: nothing" in compared and str(run_dir / "evaluation.png") in compared
    run_dir = folder / run_dir
    assert (run_dir / "evaluation.json").is_file() and (run_dir / "model-step-00000006").is_dir()
    assert "<svg" in page and all(domain in page for domain in DOMAINS)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page.replace(
        "https://www.w3.org", ""
    )


def test_a_c_locale_names_files_and_domains_in_any_script(tmp_path, monkeypatch):
    """Python takes it for ASCII only where it is told not to do what it does by default."""
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    run_command("versatune-ds", "sample", "sample", cwd=tmp_path)
    (tmp_path / "sample" / "data" / "train" / "law.jsonl").rename(tmp_path / "données 法.jsonl")
    config = {
        "run": {"dir": "run"},
        "model": {"source": "sample/model", "weights": "random"},
        "data": {"train": [{"path": "données 法.jsonl", "domain": "法律"}], "chat_template": "chatml"},
        "domains": {"names": ["法律"]},
        "batch": {"packs_per_step": 1},
        "train": {"max_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    out = run_command("versatune-ds", "prepare", "--config", "config.yaml", cwd=tmp_path)
    assert "prepared: cache" in out


def test_a_mistake_is_one_line_and_an_exit_code(tmp_path):
    out = run_command("versatune-ds", "train", "--config", str(tmp_path / "none.yaml"), code=2)
    assert out.startswith("versatune-ds: error:") and "Traceback" not in out


def test_a_real_corpus_is_learnt_in_all_six_domains(corpus_folder, tmp_path):
    """A few million parameters from random initialisation: held-out loss falls in every domain."""
    from transformers import LlamaConfig

    from versatune_ds.apps.sample import train_tokenizer

    files = {domain: next((corpus_folder / "train").glob(f"{domain}.*")) for domain in DOMAINS}
    texts = [
        file.read_text(encoding="utf-8")[:400_000] for file in files.values() if file.suffix != ".parquet"
    ]
    vocab_size = train_tokenizer(texts, tmp_path / "model", 4096)
    LlamaConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "model")
    config = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "model": {"source": str(tmp_path / "model"), "weights": "random", "dtype": "fp32"},
        "data": {
            "train": [{"path": str(file), "domain": domain} for domain, file in files.items()],
            "eval": [
                {"path": str(corpus_folder / "eval" / f"{domain}.jsonl"), "domain": domain}
                for domain in DOMAINS
            ],
            "chat_template": "chatml",
            "overlong": "truncate",
            "cache_dir": str(tmp_path / "cache"),
        },
        "domains": {
            "names": DOMAINS,
            "initial": dict(zip(DOMAINS, (0.05, 0.1, 0.05, 0.2, 0.3, 0.3), strict=True)),
            "min_weight": 0.05,
        },
        "weights": {
            "strategy": "fostering",
            "form": "exponential",
            "every_n_steps": 25,
            "reference": dict.fromkeys(DOMAINS, 3.0),
        },
        "batch": {"pack_len": 512, "packs_per_step": 2},
        "optimizer": {"lr": 2e-3},
        "train": {"max_steps": 200},
        "evaluation": {"every_n_steps": 100, "max_samples_per_domain": 20},
        "checkpoint": {"every_n_steps": 100},
    }
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(config))
    run_command("versatune-ds", "prepare", "--config", str(path))
    run_command("deepspeed", "--num_gpus", "2", "launch/train.py", "--config", str(path))
    evaluations = read_jsonl(tmp_path / "run" / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 100, 200]
    for domain in DOMAINS:
        first, middle, last = (line["domain_loss"][domain] for line in evaluations)
        assert first > middle + 1 and middle > last, (domain, first, middle, last)
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 200 and not any(line["skipped"] for line in metrics)
    updates = read_jsonl(tmp_path / "run" / "weights.jsonl")
    assert [update["step"] for update in updates] == list(range(0, 201, 25))
    assert all(sum(update["after"].values()) == pytest.approx(1) for update in updates)
    assert updates[-1]["after"] != updates[0]["after"]
    run_command("versatune-ds", "report", str(tmp_path / "run"))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 2e6 < info["num_parameters"] < 1e7
