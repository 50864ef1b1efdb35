"""The shipped sample corpus: its rows, its tokenizer, and unpacking that is atomic and repeatable.

What is not covered: training on it (see the end-to-end tests of the quick start).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from versatune_ds.apps import sample
from versatune_ds.cli.main import build_parser, main
from versatune_ds.engine.model.families import planned_shape
from versatune_ds.foundations.errors import DataError

transformers = pytest.importorskip("transformers")

Turns = list[tuple[str, str]]
SHIPPED = Path(sample.__file__).parent.parent / "sample"
AWKWARD_TEXTS = [
    " leading and trailing ",
    "two  spaces,   three,     five",
    "    def f(x):\n\t    return x  # tabs\r\n\n\n",
    "na\u00efve caf\u00e9, e\u0301 is not \u00e9, \ufb01 is a ligature",
    "\u6f22\u5b57 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\u200d\U0001f680 \u200b",
    "control \x00 \x07 \x7f and 1234567890",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    "\n",
]


def messages_turns(row: dict[str, Any]) -> Turns:
    assert set(row) == {"messages"}
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def sharegpt_turns(row: dict[str, Any]) -> Turns:
    assert set(row) == {"conversations"}
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]


def alpaca_turns(row: dict[str, Any]) -> Turns:
    assert set(row) == {"instruction", "input", "output"}
    prompt = "\n".join(text for text in (row["instruction"], row["input"]) if text)
    return [("user", prompt), ("assistant", row["output"])]


def prompt_turns(row: dict[str, Any]) -> Turns:
    assert set(row) == {"prompt", "completion"}
    return [("user", row["prompt"]), ("assistant", row["completion"])]


TRAIN_FORMATS: dict[str, Callable[[dict[str, Any]], Turns]] = {
    "law": messages_turns,
    "medicine": alpaca_turns,
    "finance": sharegpt_turns,
    "science": alpaca_turns,
    "code": messages_turns,
    "other": prompt_turns,
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    return list(rows)


def shipped_turns() -> Iterator[tuple[str, str, Turns]]:
    """(split, domain, turns) of every shipped row."""
    for domain, file_name in sample.SAMPLE_TRAIN_FILES.items():
        for row in read_rows(SHIPPED / "train" / file_name):
            yield "train", domain, TRAIN_FORMATS[domain](row)
        for row in read_rows(SHIPPED / "eval" / f"{domain}.jsonl"):
            yield "eval", domain, messages_turns(row)


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every visible file under `folder` (the lock file starts with a dot)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete unpacked sample; tests that change files make their own."""
    folder = tmp_path_factory.mktemp("sample")
    sample.unpack_sample(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(unpacked: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(unpacked / "model")


# The rows


def test_domain_order_and_counts() -> None:
    assert sample.SAMPLE_DOMAINS == ("law", "medicine", "finance", "science", "code", "other")
    counts: dict[tuple[str, str], int] = {}
    for split, domain, _ in shipped_turns():
        counts[split, domain] = counts.get((split, domain), 0) + 1
    assert all(50 <= counts["train", domain] <= 60 for domain in sample.SAMPLE_DOMAINS)
    assert all(counts["eval", domain] == 8 for domain in sample.SAMPLE_DOMAINS)


def test_turns_alternate_and_end_with_a_full_answer() -> None:
    for _, domain, turns in shipped_turns():
        roles = [role for role, _ in turns]
        without_system = roles[1:] if roles[0] == "system" else roles
        assert without_system == ["user", "assistant"] * (len(without_system) // 2), (domain, turns)
        assert all(text and text == text.strip() for _, text in turns), (domain, turns)


def test_no_prompt_and_no_answer_occurs_twice_over_all_splits() -> None:
    for wanted in ("user", "assistant"):
        texts = [
            " ".join(text.lower().split())
            for _, _, turns in shipped_turns()
            for role, text in turns
            if role == wanted
        ]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("domain", ["law", "finance", "code"])
def test_chat_formats_hold_system_messages_and_several_turns(domain: str) -> None:
    chats = [turns for split, name, turns in shipped_turns() if (split, name) == ("train", domain)]
    assert any(turns[0][0] == "system" for turns in chats)
    assert sum([role for role, _ in turns].count("assistant") > 1 for turns in chats) >= 3


@pytest.mark.parametrize("domain", ["medicine", "science"])
def test_alpaca_files_hold_rows_with_and_without_input(domain: str) -> None:
    rows = read_rows(SHIPPED / "train" / sample.SAMPLE_TRAIN_FILES[domain])
    assert 5 <= sum(bool(row["input"]) for row in rows) < len(rows)


# Unpacking


def test_unpacked_rows_are_the_shipped_ones(unpacked: Path) -> None:
    for split in ("train", "eval"):
        shipped = {path.name: path.read_bytes() for path in (SHIPPED / split).glob("*.json*")}
        assert len(shipped) == 6
        assert tree(unpacked / "data" / split) == shipped


def test_second_run_writes_nothing(unpacked: Path) -> None:
    before = tree(unpacked)
    times = {name: (unpacked / name).stat().st_mtime_ns for name in before}
    assert sample.unpack_sample(unpacked).already_there
    assert tree(unpacked) == before
    assert {name: (unpacked / name).stat().st_mtime_ns for name in before} == times


def test_two_folders_get_the_same_bytes(unpacked: Path, tmp_path: Path) -> None:
    report = sample.unpack_sample(tmp_path / "deep" / "folder")
    assert tree(tmp_path / "deep" / "folder") == tree(unpacked)
    assert set(report.written) | {sample.MARKER_NAME} == set(tree(unpacked))


@pytest.mark.parametrize("stop_after", [0, 1, 2, 8, 16])  # the marker is the first file
def test_run_killed_between_two_files_is_finished(
    stop_after: int, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample.write_bytes_atomic
    done: list[Path] = []

    def killed(path: Path, data: bytes) -> None:
        if len(done) == stop_after:
            (path.parent / f".{path.name}.abcd1234").write_bytes(data[:10])  # what a kill leaves behind
            raise KeyboardInterrupt
        done.append(path)
        whole(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_bytes_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            sample.unpack_sample(tmp_path)
    report = sample.unpack_sample(tmp_path)
    assert len(report.written) == 16 - max(0, stop_after - 1) and not report.replaced
    assert tree(tmp_path) == tree(unpacked)
    assert [path.name for path in tmp_path.rglob(".*")] == [".sample.lock"]


def test_damaged_and_missing_files_are_replaced_and_named(unpacked: Path, tmp_path: Path) -> None:
    sample.unpack_sample(tmp_path)
    damaged, missing, extra = (
        tmp_path / "model/tokenizer.json",
        tmp_path / "data/eval/code.jsonl",
        tmp_path / "notes.txt",
    )
    damaged.write_bytes(damaged.read_bytes()[:100])
    missing.unlink()
    extra.write_text("mine")
    report = sample.unpack_sample(tmp_path)
    assert report.replaced == ("model/tokenizer.json",)
    assert report.written == ("data/eval/code.jsonl",)
    assert extra.read_text() == "mine"
    extra.unlink()
    assert tree(tmp_path) == tree(unpacked)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "source": "x"}', "\x80"])
def test_broken_marker_is_repaired(text: str, unpacked: Path, tmp_path: Path) -> None:
    sample.unpack_sample(tmp_path)
    (tmp_path / sample.MARKER_NAME).write_text(text, encoding="latin-1")
    assert sample.unpack_sample(tmp_path).already_there
    assert tree(tmp_path) == tree(unpacked)


def test_foreign_file_under_one_of_our_names_is_kept(tmp_path: Path) -> None:
    own = tmp_path / "data/train/law.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("my own rows\n")
    with pytest.raises(DataError, match="Name an empty folder") as caught:
        sample.unpack_sample(tmp_path)
    assert caught.value.path == str(own)
    assert tree(tmp_path) == {"data/train/law.jsonl": b"my own rows\n"}


def test_file_instead_of_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a folder is needed"):
        sample.unpack_sample(tmp_path / "file")


def test_other_vocabulary_size_replaces_the_model_only(tmp_path: Path) -> None:
    sample.unpack_sample(tmp_path)
    report = sample.unpack_sample(tmp_path, vocab_size=1000)
    assert report.vocab_size == 1000
    assert report.replaced and all(name.startswith("model/") for name in report.replaced)
    assert json.loads((tmp_path / "model/config.json").read_text())["vocab_size"] == 1024


# Tokenizer and model


def test_auto_tokenizer_is_fast_plain_and_without_template(tokenizer: Any) -> None:
    assert tokenizer.is_fast and len(tokenizer) == sample.DEFAULT_VOCAB_SIZE
    ids = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert [*ids, tokenizer.pad_token_id] == [0, 1, 2, 3]
    assert tokenizer.chat_template is None
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode("a</s>b").count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_decode_inverts_encode(text: str, tokenizer: Any) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_fast_tokenizer_segments_as_sentencepiece_does(unpacked: Path, tokenizer: Any) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(unpacked / "model/tokenizer.model"))
    texts = [text for _, _, turns in shipped_turns() for _, text in turns] + AWKWARD_TEXTS
    special_free = [text for text in texts if "\x00" not in text]
    assert [tokenizer.encode(text) for text in special_free] == processor.encode(special_free)


def test_tokenizer_json_works_without_transformers(unpacked: Path, tokenizer: Any) -> None:
    # `transformers` takes only vocabulary and merges from it; other programs take all of it.
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(unpacked / "model/tokenizer.json"))
    for text in AWKWARD_TEXTS:
        assert plain.encode(text).ids == tokenizer.encode(text)
        assert plain.decode(plain.encode(text).ids) == text


def test_offsets_cover_the_text(tokenizer: Any) -> None:
    for text in [*AWKWARD_TEXTS, *(text for _, _, turns in shipped_turns() for _, text in turns)]:
        end = 0
        for start, stop in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
            assert start <= end <= stop and start < stop  # the bytes of one character share its span
            end = stop
        assert end == len(text)


def test_shipped_text_takes_fewer_tokens_than_half_its_characters(tokenizer: Any) -> None:
    texts = [text for _, _, turns in shipped_turns() for _, text in turns]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert tokens < sum(map(len, texts)) / 2


def test_saved_tokenizer_stays_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD_TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text


def test_config_describes_a_small_llama_that_runs(unpacked: Path, tokenizer: Any) -> None:
    import torch

    config = transformers.AutoConfig.from_pretrained(unpacked / "model")
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert config.vocab_size % 64 == 0 and config.vocab_size >= len(tokenizer)
    assert config.max_position_embeddings == 2048
    model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == planned_shape(sample.llama_config(len(tokenizer)), "sample").parameters
    assert 1_000_000 <= parameters <= 3_000_000
    ids = torch.tensor([tokenizer.encode("What is a court?")])
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], config.vocab_size)


def test_train_tokenizer_takes_files_and_texts_alike(tmp_path: Path) -> None:
    texts = [text for _, domain, turns in shipped_turns() if domain == "law" for _, text in turns]
    files = []
    for i, text in enumerate(texts):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_bytes(text.encode("utf-8"))
    assert sample.train_tokenizer(iter(texts), tmp_path / "a", vocab_size=600) == 600
    sample.train_tokenizer(files, tmp_path / "b", vocab_size=600)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "a")) == 600


def test_train_tokenizer_learns_from_long_lines_and_from_lines_with_tabs(tmp_path: Path) -> None:
    # sentencepiece leaves out overlong sentences and those with a tab, its boundary character.
    sample.train_tokenizer(["zyzzyva " * 20_000, "quokka\tquokka\t" * 50], tmp_path, vocab_size=285)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode("zyzzyva")) == 1
    assert len(tokenizer.encode("quokka")) < 6


@pytest.mark.parametrize("vocab_size", [0, 260, 10_000_000])
def test_impossible_vocabulary_size_is_refused(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{vocab_size}"):
        sample.train_tokenizer(["some text"], tmp_path, vocab_size=vocab_size)
    assert not tree(tmp_path)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "\t"]])
def test_training_on_nothing_is_refused(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        sample.train_tokenizer(texts, tmp_path, vocab_size=300)


# Command line


def test_verb_prints_files_and_next_command_then_says_already_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample"]) == 0
    first = capsys.readouterr().out
    assert "data/train/law.jsonl" in first and "model/config.json" in first
    assert "versatune-ds prepare --config configs/quickstart.yaml" in first
    assert main(["sample"]) == 0
    second = capsys.readouterr().out
    assert "already" in second and "law.jsonl" not in second
    assert main(["sample", "elsewhere"]) == 0
    assert "next: settings like configs/quickstart.yaml, with elsewhere in place" in capsys.readouterr().out


def test_verb_defaults_to_the_quick_start_folder() -> None:
    assert build_parser().parse_args(["sample"]).folder == "runs/sample"
