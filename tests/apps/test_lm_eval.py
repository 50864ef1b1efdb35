"""Benchmark tasks through lm-evaluation-harness: four questions in a local file and a tiny random model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from versatune_ds.apps.evaluate import lm_eval as benchmarks
from versatune_ds.apps.evaluate.lm_eval import check_benchmarks_can_run, read_metric
from versatune_ds.config.benchmarks import load_benchmarks
from versatune_ds.config.model import Model
from versatune_ds.foundations.errors import ConfigError

QUESTIONS = [
    {"question": "Who signs a contract?", "choices": ["the parties", "nobody", "a bird"], "answer": 0},
    {"question": "What is a tort?", "choices": ["a cake", "a civil wrong"], "answer": 1},
    {"question": "Who decides a case?", "choices": ["a judge", "the weather", "a coin"], "answer": 0},
    {"question": "Is theft a crime?", "choices": ["no", "yes"], "answer": 1},
]
TASKS = """
include: tasks
batch_size: 2
tasks:
  - {task: tiny_law, name: Tiny law, domain: law, metric: acc}
  - {task: null, name: Only named, domain: law, metric: acc}
  - {task: no_such_task, name: Lost, domain: code, metric: acc}
"""


@pytest.fixture
def tasks(tmp_path):
    """A benchmark file with a task file and its data beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "tiny_law",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "tasks.yaml").write_text(TASKS)
    return load_benchmarks(tmp_path / "tasks.yaml", ["law", "code"])


@pytest.fixture
def model(tmp_path):
    """Folder with a random two-layer Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from versatune_ds.apps.sample import train_tokenizer

    folder = tmp_path / "model"
    vocab_size = train_tokenizer([json.dumps(row) for row in QUESTIONS] * 20, folder, 320)
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape)).save_pretrained(folder)
    return folder


def accuracy(folder) -> float:
    """What the score should be, straight from the model: the likeliest choice, log probabilities summed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in QUESTIONS:
        prompt = f"Question: {row['question']}\nAnswer:"
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
            with torch.no_grad():
                logits = lm(ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            sums.append(float(logits.gather(1, ids[1:, None])[start - 1 :].sum()))
        right += int(max(range(len(sums)), key=sums.__getitem__) == row["answer"])
    return right / len(QUESTIONS)


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_of_the_likeliest_choice(tasks, model, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = Model(source=str(model), dtype="fp32")
    kept: list[benchmarks.Scores] = []
    found = benchmarks.run_benchmarks(str(model), tasks, settings, torch.device("cpu"), kept.append)
    waiting = [[why == benchmarks.NOT_REACHED for why in so_far.not_run.values()] for so_far in kept]
    assert [sum(flags) for flags in waiting] == list(range(len(tasks.tasks), 0, -1))
    assert len(kept[0].scores) == 0 and len(kept[-1].scores) == 1
    (score,) = found.scores
    assert (score.task, score.name, score.domain, score.metric) == ("tiny_law", "Tiny law", "law", "acc")
    assert score.samples == 4
    assert score.value == pytest.approx(accuracy(model))
    assert set(found.not_run) == {"Only named", "Lost"}
    assert "no task" in found.not_run["Only named"] and "no_such_task" in found.not_run["Lost"]


@pytest.mark.slow
def test_an_adapter_folder_is_scored_on_its_base_model(tasks, model, tmp_path, monkeypatch):
    """As far from the base that the scores of the two differ."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for seed in range(20):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4, lora_alpha=400, init_lora_weights=False, target_modules=["q_proj", "down_proj"]
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(adapter)
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
        whole.merge_and_unload().save_pretrained(merged)
        for folder in (adapter, merged):
            AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        if accuracy(merged) != accuracy(model):
            break
    assert accuracy(merged) != accuracy(model)
    settings = Model(source=str(model), dtype="fp32")
    found = benchmarks.run_benchmarks(str(adapter), tasks, settings, torch.device("cpu"), lambda _: None)
    assert [score.value for score in found.scores] == pytest.approx([accuracy(merged)])


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tasks, monkeypatch):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'versatune-ds\[eval\]'"):
        check_benchmarks_can_run(tasks)
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: object())
    check_benchmarks_can_run(tasks)
    running = tasks.model_copy(update={"tasks": [tasks.tasks[0].model_copy(update={"runs_code": True})]})
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ConfigError, match="Tiny law run programs that the model wrote"):
        check_benchmarks_can_run(running)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    check_benchmarks_can_run(running)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        check_benchmarks_can_run(tasks)


def test_metrics_are_read_from_whatever_filter_reports_them():
    result = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "pass@1,create_test": 0.25}
    result["pass@1_stderr,create_test"] = "N/A"
    assert read_metric(result, "acc") == (0.5, 0.1)
    assert read_metric(result, "pass@1") == (0.25, None)
    with pytest.raises(ConfigError, match=r"no metric 'f1'; it has: acc, pass@1"):
        read_metric(result, "f1")


def test_an_evaluation_that_is_ended_keeps_what_it_has(monkeypatch, tmp_path):
    """Held-out losses before the first benchmark, and every score as soon as there is one."""
    from versatune_ds.apps.evaluate import held_out as measure
    from versatune_ds.domain.evaluation import BenchmarkScore, Fingerprints, ModelEvaluation

    evaluation = ModelEvaluation(
        model="m",
        losses={"law": np.array([1.0])},
        tokens={"law": np.array([2.0])},
        fingerprints=Fingerprints(model="a", tokenizer="b", data="c"),
        provenance={},
    )
    seen = []

    def ended(source, tasks, model, device, keep):
        seen.append(ModelEvaluation.read(tmp_path / "evaluation.json").benchmarks)
        score = BenchmarkScore("t", "One", "law", "acc", 0.5, None, 4)
        keep(benchmarks.Scores((score,), {"Two": benchmarks.NOT_REACHED}))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "resolve_target", lambda model, config: SimpleNamespace(source="m"))
    monkeypatch.setattr(measure, "measure", lambda *arguments: evaluation)
    monkeypatch.setattr(measure, "run_benchmarks", ended)
    config = SimpleNamespace(model=None)
    with pytest.raises(KeyboardInterrupt):
        measure.evaluate_in_group(config, "m", torch.device("cpu"), tasks=object(), out=tmp_path)
    left = ModelEvaluation.read(tmp_path / "evaluation.json")
    assert seen == [()] and [score.name for score in left.benchmarks] == ["One"]
    assert left.provenance["benchmarks_not_run"] == {"Two": benchmarks.NOT_REACHED}
    assert left.losses["law"].tolist() == [1.0]
