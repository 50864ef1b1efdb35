"""Bytes of supervised text, counted on tokens, are the bytes of the answers that were tokenised."""

import pytest
from prepared import data_config, qwen_like_tokenizer, write_jsonl

from versatune_ds.data.cache.prepare import open_caches, prepare
from versatune_ds.data.cache.text_bytes import bytes_per_token
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.foundations.errors import DataError

ANSWERS = ["  two spaces", "an answer of words", "größe 北京 🙂", "a\nb\n\nc ", "x"]


def sentencepiece_tokenizer(folder) -> None:
    from versatune_ds.apps.sample import train_tokenizer

    train_tokenizer([f"{answer} and a question?" for answer in ANSWERS] * 20, folder, 320)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_bytes_are_those_of_the_answers(tmp_path, kind):
    folder = tmp_path / "tokenizer"
    if kind == "byte level":
        qwen_like_tokenizer().save_pretrained(folder)
    else:
        sentencepiece_tokenizer(folder)
    rows = [{"prompt": f"question {i}?", "completion": answer} for i, answer in enumerate(ANSWERS)]
    config = data_config(
        tmp_path, folder, write_jsonl(tmp_path / "law.jsonl", rows), initial={"law": 1.0, "code": 0.0}
    )
    prepare(config, progress=False)
    cache, absent = open_caches(config)["train"]
    ratio = bytes_per_token([cache], ["law"], load_tokenizer(config))
    expected = sum(len(answer.encode()) for answer in ANSWERS)
    # the template may put a line end or the like before the stop token, and strips nothing of the answers
    assert ratio[0] * cache.num_supervised == pytest.approx(expected, abs=len(ANSWERS))
    with pytest.raises(DataError, match="code has no prepared data"):
        bytes_per_token([cache, absent], ["law", "code"], load_tokenizer(config))


def test_at_most_so_many_samples_are_decoded(tmp_path):
    folder = tmp_path / "tokenizer"
    qwen_like_tokenizer().save_pretrained(folder)
    rows = [{"prompt": "q", "completion": "ab" * (1 + i % 7)} for i in range(300)]
    config = data_config(
        tmp_path, folder, write_jsonl(tmp_path / "law.jsonl", rows), initial={"law": 1.0, "code": 0.0}
    )
    prepare(config, progress=False)
    cache = open_caches(config)["train"][0]
    tokenizer = load_tokenizer(config)
    whole = bytes_per_token([cache], ["law"], tokenizer)
    assert bytes_per_token([cache], ["law"], tokenizer, max_samples=50) == pytest.approx(whole, rel=0.1)
