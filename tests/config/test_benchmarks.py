"""Files of benchmark tasks."""

from __future__ import annotations

import pytest
from launching import REPOSITORY

from versatune_ds.config.benchmarks import load_benchmarks
from versatune_ds.foundations.errors import ConfigError

DOMAINS = ["law", "medicine", "finance", "science", "code", "other"]
FILE = "tasks:\n  - {task: t1, name: T, domain: law, metric: acc}\n"


def test_the_papers_twelve_are_grouped_by_domain():
    found = load_benchmarks(REPOSITORY / "configs" / "benchmarks" / "paper.yaml", DOMAINS)
    names = {domain: [t.name for t in found.tasks if t.domain == domain] for domain in DOMAINS}
    assert names == {
        "law": ["LegalBench", "LawBench"],
        "medicine": ["MedQA", "MedMCQA"],
        "finance": ["FinEval", "FinanceIQ"],
        "science": ["SciEval", "MMLU-Sci"],
        "code": ["HumanEval", "MBPP"],
        "other": ["HellaSwag", "AGIEval"],
    }
    assert [task.name for task in found.tasks if task.runs_code] == names["code"]


def test_the_papers_tasks_exist_in_the_harness():
    """Names and metrics against the task files that the harness ships; no data set is loaded."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    found = load_benchmarks(REPOSITORY / "configs" / "benchmarks" / "paper.yaml", DOMAINS)
    assert {task.task for task in found.tasks if task.task is not None} <= known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        (FILE.replace("law", "lore"), "unknown domain 'lore'"),
        (FILE + FILE.splitlines()[1] + "\n", "t1 stands twice"),
        (FILE.replace("metric", "metrik"), r"tasks.0.metrik: unknown key; did you mean metric"),
        (FILE + "includ: x\n", "did you mean include"),
        (FILE + "include: nowhere\n", "not a folder"),
        ("tasks: []\n", "tasks: "),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_benchmarks(path, DOMAINS)
    with pytest.raises(ConfigError, match="configs/benchmarks"):
        load_benchmarks(tmp_path / "none.yaml", DOMAINS)
