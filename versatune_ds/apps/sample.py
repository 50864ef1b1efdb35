"""Unpack the shipped sample corpus, with a tokenizer trained on it and a tiny model configuration.

    FOLDER/data/train/<domain>.<json|jsonl>   copies of versatune_ds/sample/train
    FOLDER/data/eval/<domain>.jsonl           copies of versatune_ds/sample/eval
    FOLDER/model/tokenizer.json ...           sentencepiece BPE with byte fallback, as in LLaMA
    FOLDER/model/config.json                  a LlamaConfig of 1.3 M parameters, for random initialisation
    FOLDER/sample.json                        marker: the SHA-256 of every file, written before the others

The tokenizer is trained by sentencepiece and saved in the form that `transformers` loads as a fast
`LlamaTokenizer` (vocabulary and merges in tokenizer.json), so that loading needs neither sentencepiece nor
protobuf and gives character offsets. No dummy prefix, no normalisation and byte fallback together make
`decode(encode(text)) == text`. No <s> or </s> is added by `encode`, and there is no chat template: a config
names one.

Everything is made in memory and then written file by file, each atomically, after the marker that says what
the whole will be. A second call finds all of it and changes nothing; after a kill it finishes the work.

What is not covered: U+2581 (lower one eighth block), which sentencepiece uses for the space and which
therefore decodes as one; equal tokenizers from different versions of sentencepiece.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from filelock import FileLock

from versatune_ds.engine.model.families import planned_shape
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.files import remove_temporaries, write_bytes_atomic

# Domain order of the project, and the shipped training file of each domain: four row formats among them.
SAMPLE_TRAIN_FILES: dict[str, str] = {
    "law": "law.jsonl",  # messages
    "medicine": "medicine.json",  # Alpaca
    "finance": "finance.jsonl",  # ShareGPT
    "science": "science.json",  # Alpaca
    "code": "code.jsonl",  # messages
    "other": "other.jsonl",  # prompt/completion
}
SAMPLE_DOMAINS: tuple[str, ...] = tuple(SAMPLE_TRAIN_FILES)

DEFAULT_VOCAB_SIZE = 2048
MARKER_NAME = "sample.json"
MARKER_FORMAT = 1

UNK_TOKEN, BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)  # ids 0, 1, 2, 3
FIRST_PIECE_ID = len(SPECIAL_TOKENS) + 256  # the byte tokens <0x00>..<0xFF> come after the special ones
SPACE_PIECE = "\u2581"

MAX_POSITION_EMBEDDINGS = 2048
VOCAB_MULTIPLE = 64
# sentencepiece leaves out, with no more than a log line, every sentence that is longer than its limit in
# bytes (UTF-8 takes at most 4 per character) or that holds one of its reserved characters.
MAX_SENTENCE_CHARS = 16_384
SENTENCE_BREAKS = re.compile("[\r\n\t\x00\u2585]+")


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What `unpack_sample` did; the paths are relative to `folder`, in the order of writing."""

    folder: Path
    written: tuple[str, ...]
    """Files that were not there before."""
    replaced: tuple[str, ...]
    """Files that were there with other content: damaged, edited, or from another version."""
    vocab_size: int
    """Entries of the tokenizer."""
    parameters: int
    """Parameters of the model that model/config.json describes."""

    @property
    def already_there(self) -> bool:
        """True when every file was in place and nothing was written."""
        return not self.written and not self.replaced


def unpack_sample(folder: str | Path, *, vocab_size: int = DEFAULT_VOCAB_SIZE) -> SampleReport:
    """Write corpus, tokenizer and model configuration into `folder`; see the module docstring.

    Running it again writes nothing. Files of an earlier `unpack_sample` that are missing or differ are
    written anew and named in the report; other files in the folder are left alone.

    Args:
        vocab_size: entries of the tokenizer, 4 special tokens and 256 bytes included.

    Raises:
        DataError: `folder` is a file, holds somebody else's file under one of our names, or `vocab_size`
            is out of the range that the corpus allows.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError("found a file where a folder is needed; name another folder", path=folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".sample.lock"):
        shipped = _shipped_files()
        files = shipped | {f"model/{name}": data for name, data in _model_files(shipped, vocab_size).items()}
        if not (folder / MARKER_NAME).is_file():
            _refuse_foreign_files(folder, files)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        marker = _json_bytes({"format": MARKER_FORMAT, "files": digests})
        _write(folder, {MARKER_NAME: marker})
        written, replaced = _write(folder, files)
        parameters = planned_shape(llama_config(vocab_size), "sample").parameters
        return SampleReport(
            folder=folder, written=written, replaced=replaced, vocab_size=vocab_size, parameters=parameters
        )


def train_tokenizer(
    texts: Iterable[str | Path], folder: str | Path, vocab_size: int = DEFAULT_VOCAB_SIZE
) -> int:
    """Train a sentencepiece BPE tokenizer and write tokenizer.json, tokenizer_config.json, tokenizer.model.

    The result depends on the texts and their order only: one thread, no sampling, no path in the model.

    Args:
        texts: a `str` is a text, a `Path` is a UTF-8 text file. Read once, line by line.
        folder: made when absent; load it with `AutoTokenizer.from_pretrained(folder)`.
        vocab_size: entries, 4 special tokens (<unk> <s> </s> <pad>) and 256 bytes included.

    Returns:
        The number of entries, equal to `vocab_size`.

    Raises:
        DataError: no text, or `vocab_size` is out of the range that the texts allow.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _tokenizer_files(texts, vocab_size).items():
        write_bytes_atomic(folder / name, data)
    return vocab_size


def llama_config(vocab_size: int) -> dict[str, Any]:
    """The content of config.json: a LlamaConfig with hidden size 128, 4 layers and untied embeddings.

    `vocab_size` (entries of the tokenizer) is rounded up to a multiple of 64, as a model for GPUs would do.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIAL_TOKENS.index(BOS_TOKEN),
        "eos_token_id": SPECIAL_TOKENS.index(EOS_TOKEN),
        "pad_token_id": SPECIAL_TOKENS.index(PAD_TOKEN),
        "dtype": "float32",
    }


# Unpacking


def _shipped_files() -> dict[str, bytes]:
    """The shipped rows, by their path under the sample folder, in the project's domain order."""
    root = resources.files("versatune_ds.sample")
    names = [f"train/{name}" for name in SAMPLE_TRAIN_FILES.values()]
    names += [f"eval/{domain}.jsonl" for domain in SAMPLE_DOMAINS]
    return {f"data/{name}": root.joinpath(*name.split("/")).read_bytes() for name in names}


def _model_files(shipped: Mapping[str, bytes], vocab_size: int) -> dict[str, bytes]:
    texts = [
        text
        for name, data in shipped.items()
        if name.startswith("data/train/")
        for row in _rows(name, data)
        for text in strings_in(row)
    ]
    files = _tokenizer_files(texts, vocab_size)
    return files | {"config.json": _json_bytes(llama_config(vocab_size))}


def _rows(name: str, data: bytes) -> list[Any]:
    text = data.decode("utf-8")
    if name.endswith(".json"):
        rows: list[Any] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines() if line]


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a row of any format; the speaker's name ("role", "from") is not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from strings_in(item)


def _refuse_foreign_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Without our marker, a file under one of our names is the user's own, unless it is the same."""
    for name, data in files.items():
        path = folder / name
        if path.exists() and (path.is_dir() or path.read_bytes() != data):
            raise DataError(
                f"found a file that the sample did not write ({MARKER_NAME} is missing in {folder}); "
                "it would be overwritten. Name an empty folder",
                path=path,
            )


def _write(folder: Path, files: Mapping[str, bytes]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write what is not there or differs; returns the names of the new files and of the replaced ones."""
    written: list[str] = []
    replaced: list[str] = []
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path)  # they lie beside their targets, where a reader could take them for data
        is_new = not path.exists()
        if is_new or path.read_bytes() != data:
            (written if is_new else replaced).append(name)
            write_bytes_atomic(path, data)
    return tuple(written), tuple(replaced)


# Tokenizer


def _tokenizer_files(texts: Iterable[str | Path], vocab_size: int) -> dict[str, bytes]:
    model = _train_sentencepiece(texts, vocab_size)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": UNK_TOKEN,
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": MAX_POSITION_EMBEDDINGS,
    }
    return {
        "tokenizer.model": model,
        "tokenizer.json": _fast_tokenizer_json(model),
        "tokenizer_config.json": _json_bytes(config),
    }


def _train_sentencepiece(texts: Iterable[str | Path], vocab_size: int) -> bytes:
    """The serialized sentencepiece model; its 256 byte tokens make every text encodable."""
    import sentencepiece

    if vocab_size <= FIRST_PIECE_ID:
        raise DataError(
            f"found vocab_size {vocab_size}; more than {FIRST_PIECE_ID} is needed, because "
            f"{len(SPECIAL_TOKENS)} special tokens and 256 bytes come first"
        )
    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise DataError("found no text to train a tokenizer on; at least one line is needed")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * MAX_SENTENCE_CHARS,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,  # errors only; they come back as exceptions
        )
    except RuntimeError as error:
        raise DataError(
            f"sentencepiece cannot train a tokenizer of {vocab_size} entries on these texts; use fewer "
            f"entries or more text. It says: {error}"
        ) from error
    return model.getvalue()


def _sentences(texts: Iterable[str | Path]) -> Iterator[str]:
    """Pieces of text that sentencepiece takes whole: split at its reserved characters, never too long."""
    for text in texts:
        if isinstance(text, Path):
            with open(text, encoding="utf-8", newline="") as file:
                yield from _sentences(file)
            continue
        for line in SENTENCE_BREAKS.split(text):
            for start in range(0, len(line), MAX_SENTENCE_CHARS):
                yield line[start : start + MAX_SENTENCE_CHARS]


def _fast_tokenizer_json(model: bytes) -> bytes:
    """tokenizer.json with the same segmentation as the sentencepiece `model`.

    sentencepiece joins the neighbours whose joined piece has the best score, and its BPE pieces are in the
    order of their scores. So the merges are: for each piece in order, each split of it into two pieces.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces: list[str] = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    joinable = frozenset(pieces[FIRST_PIECE_ID:])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[FIRST_PIECE_ID:]
        for cut in range(1, len(piece))
        if piece[:cut] in joinable and piece[cut:] in joinable
    ]
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token=UNK_TOKEN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE_PIECE, prepend_scheme="never", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return (tokenizer.to_str(pretty=True) + "\n").encode("utf-8")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")
