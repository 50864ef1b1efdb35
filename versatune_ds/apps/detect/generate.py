"""Texts that a base model writes from its BOS token alone, in batches, by transformers or by vLLM.

Texts are numbered over all rounds and come in fixed batches: batch b holds the texts b * B .. b * B + B - 1
and has its own seed, a hash of (`detect.seed`, b). Which rank generates a batch, and when, changes nothing,
so a run that was killed goes on to the texts of one that was not. (Another device, dtype or version of torch
may round differently and so write other texts; vLLM promises less, see docs/detect.md.)

The prompt is the tokenizer's BOS token, or its EOS token where it has none (Qwen2.5). Sampling is what
`detect` says and nothing else: a model folder's own generation_config.json contributes only the tokens that
end a text.

What is not covered: models larger than one device with transformers (vLLM spreads over the GPUs of a node).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, GenerationConfig

from versatune_ds.config.detection import Detect
from versatune_ds.config.model import Model
from versatune_ds.config.schema import Config
from versatune_ds.engine.answers.decoding import continuations, cut_text
from versatune_ds.engine.fingerprints import model_fingerprint, weight_files
from versatune_ds.engine.model.source import DTYPES, load_architecture, load_lm
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.foundations.files import canonical_hash
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import is_blank

log = get_logger(__name__)


@dataclass(frozen=True)
class GeneratedText:
    index: int
    """Number over all rounds; its round is index // detect.sequences."""
    text: str
    num_tokens: int
    """Generated tokens, the end token not counted."""
    finished: bool
    """Whether the model ended it; False: cut at detect.max_new_tokens."""

    @property
    def is_blank(self) -> bool:
        """Nothing a judge could see (`foundations.text.is_blank`)."""
        return is_blank(self.text)

    def to_json(self) -> dict[str, Any]:
        """Line of sequences.jsonl."""
        return asdict(self)


class Generator(Protocol):
    def generate(self, batch: int, indices: Sequence[int]) -> list[GeneratedText]:
        """The texts with these indices, all of batch number `batch`."""
        ...


def batch_seed(seed: int, batch: int) -> int:
    """63-bit seed of a batch: well mixed, the same everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:8], "big") >> 1


def subject(config: Config) -> Model:
    """Settings of the model to examine: `detect.model`, always with its weights, or the run's own model."""
    return config.model if config.detect.model is None else other_model(config.detect.model, config.model)


def other_model(source: str, like: Model) -> Model:
    """Settings as another model's, with another source."""
    return like.model_copy(update={"source": source, "tokenizer": None, "weights": "pretrained"})


def subject_fingerprint(settings: Model, seed: int) -> str:
    """Hash of the model to examine: `fingerprints.model_fingerprint`, and the seed of a random one.

    Raises:
        ConfigError: no such model, or a folder without weights.
    """
    fingerprint = model_fingerprint(settings)
    if settings.weights == "random":
        return canonical_hash([fingerprint, "random", seed])
    folder = Path(settings.source)
    if folder.is_dir() and not weight_files(folder):
        raise ConfigError(
            f"{settings.source} has no weights (*.safetensors): it is the shape of a model. Name a trained "
            "one with --model FOLDER, e.g. RUN/model; model.weights: random examines an untrained one"
        )
    return fingerprint


def load_text_tokenizer(settings: Model) -> Any:
    """The tokenizer of the model to examine.

    Raises:
        ConfigError: it cannot be loaded, or has neither a BOS nor an EOS token to start from.
    """
    name = settings.tokenizer or settings.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"the tokenizer {name} cannot be loaded: {error}") from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {name} has neither a BOS nor an EOS token, so there is nothing to start a text "
            "from; set one in its tokenizer_config.json"
        )
    return tokenizer


def prompt_token(tokenizer: Any) -> int:
    """Id of the token that texts start from: BOS, or EOS where there is no BOS."""
    token = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if token is None else token)


def end_tokens(settings: Model, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a text: the model folder's and the tokenizer's; may be empty."""
    found: list[int] = []
    try:
        given = GenerationConfig.from_pretrained(settings.source).eos_token_id
        found += given if isinstance(given, list) else [given]
    except OSError:  # the folder has none
        pass
    return sorted({int(token) for token in [*found, tokenizer.eos_token_id] if token is not None})


def max_new_tokens(detect: Detect, settings: Model) -> int:
    """`detect.max_new_tokens`, or what the model's positions allow behind the prompt; says so when fewer."""
    positions = getattr(load_architecture(settings), "max_position_embeddings", None)
    if positions is None or detect.max_new_tokens < positions:
        return detect.max_new_tokens
    log.warning(
        "detect.max_new_tokens is %d, the model has %d positions: texts end after %d tokens",
        detect.max_new_tokens,
        positions,
        positions - 1,
    )
    return int(positions) - 1


def choose_generator(wanted: str, device_type: str) -> str:
    """`detect.generator` as "vllm" or "transformers", logged with its reason.

    Raises:
        ConfigError: vLLM is asked for and cannot be used.
    """
    problem = None
    if importlib.util.find_spec("vllm") is None:
        problem = "vllm is not installed (pip install versatune-ds[vllm])"
    elif distributed.world_size() > 1:
        problem = "vLLM spreads over the GPUs of a node by itself: start one process, without a launcher"
    elif wanted == "auto" and device_type != "cuda":
        problem = "no CUDA device"
    if wanted == "vllm" and problem is not None:
        raise ConfigError(f"detect.generator is vllm: {problem}")
    chosen = "transformers" if wanted == "transformers" or problem is not None else "vllm"
    log.info("generator: %s (%s)", chosen, "asked for" if wanted == chosen else problem or "installed")
    return chosen


def build_generator(kind: str, config: Config, tokenizer: Any, device: torch.device) -> Generator:
    """The generator of a run, with its model loaded; ConfigError where that cannot be."""
    settings = subject(config)
    limit = max_new_tokens(config.detect, settings)
    if kind == "vllm":
        return VllmGenerator(config.detect, settings, tokenizer, limit)
    model = load_model(settings, config.run.seed, device)
    return TransformersGenerator(config.detect, model, tokenizer, end_tokens(settings, tokenizer), limit)


def load_model(settings: Model, seed: int, device: torch.device) -> Any:
    """A whole causal LM on `device`, ready to generate or to score.

    Raises:
        ConfigError: it cannot be loaded, or lacks weights.
    """
    if settings.weights == "random":
        log.warning(
            "model.weights is random: an untrained model knows nothing, and its distribution is noise "
            "as the judge sees it. Name a trained model with --model FOLDER"
        )
    model: Any = load_lm(settings, seed)
    return model.to(device).eval()


class TransformersGenerator:
    """Batched sampling with a KV cache by `transformers`; the whole model lies on one device.

    Args:
        model: a causal LM in eval mode.
        ends: ids of the tokens that end a text.
        limit: longest text in tokens.
    """

    def __init__(self, detect: Detect, model: Any, tokenizer: Any, ends: list[int], limit: int) -> None:
        self.detect = detect
        self.model = model
        self.tokenizer = tokenizer
        self.ends = ends
        self.settings = GenerationConfig(
            do_sample=True,
            temperature=detect.temperature,
            top_p=detect.top_p,
            top_k=detect.top_k,
            repetition_penalty=detect.repetition_penalty,
            max_new_tokens=limit,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,  # fills rows that ended; cut off again
            use_cache=True,
        )

    @torch.inference_mode()
    def generate(self, batch: int, indices: Sequence[int]) -> list[GeneratedText]:
        """See `Generator`; the rows of a batch share its seed, so a batch is always generated whole."""
        torch.manual_seed(batch_seed(self.detect.seed, batch))
        start = prompt_token(self.tokenizer)
        try:
            rows = continuations(self.model, [[start]] * len(indices), self.settings, self.model.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the device is out of memory; lower detect.batch_size or detect.max_new_tokens"
            ) from error
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise VersaTuneError(
                f"the model {self.model.config.name_or_path!r} gives probabilities that are not finite; its "
                "weights are damaged, or model.dtype is too narrow for it"
            ) from error
        texts = zip(indices, rows, strict=True)
        return [GeneratedText(i, *cut_text(self.tokenizer, tokens, self.ends)) for i, tokens in texts]


class VllmGenerator:
    """Generation by vLLM over all GPUs that this process sees; every text has a seed of its own."""

    def __init__(self, detect: Detect, settings: Model, tokenizer: Any, limit: int) -> None:
        from vllm import LLM

        if settings.weights == "random":
            raise ConfigError("detect.generator vllm loads weights from files, and model.weights is random")
        self.detect = detect
        self.tokenizer = tokenizer
        self.ends = end_tokens(settings, tokenizer)
        self.limit = limit
        self.llm = LLM(
            model=settings.source,
            tokenizer=settings.tokenizer or settings.source,
            dtype=str(DTYPES[settings.dtype]).removeprefix("torch."),
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            trust_remote_code=settings.trust_remote_code,
            generation_config="vllm",  # not the model folder's sampling settings
            max_model_len=limit + 1,
            seed=detect.seed,
        )

    def generate(self, batch: int, indices: Sequence[int]) -> list[GeneratedText]:
        from vllm import SamplingParams

        detect = self.detect
        chosen = [
            SamplingParams(
                temperature=detect.temperature,
                top_p=detect.top_p,
                top_k=detect.top_k or -1,
                repetition_penalty=detect.repetition_penalty,
                max_tokens=self.limit,
                stop_token_ids=self.ends,
                seed=batch_seed(detect.seed, index) & 0x7FFFFFFF,
            )
            for index in indices
        ]
        prompts = [{"prompt_token_ids": [prompt_token(self.tokenizer)]} for _ in indices]
        outputs = self.llm.generate(prompts, chosen, use_tqdm=False)
        return [
            GeneratedText(index, *cut_text(self.tokenizer, output.outputs[0].token_ids, self.ends))
            for index, output in zip(indices, outputs, strict=True)
        ]
