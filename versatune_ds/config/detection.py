"""Settings of `versatune-ds detect`: how texts are generated, and what tells their domain.

What is not covered: the other sections (`config/schema.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from versatune_ds.config.section import PlaceText, Section

MIN_PROBE_TEXTS = 10


class Endpoint(Section):
    """A server that speaks OpenAI's API (vLLM's, for one) and gives log-probabilities."""

    url: str
    """Base of the API, e.g. `http://host:8000/v1`; `/chat/completions` or `/completions` is added."""
    model: str
    """The model's name on that server."""
    api: Literal["chat", "completions"] = "chat"
    """`chat` for instruction-tuned judges; `completions` sends plain text."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    top_logprobs: int = Field(20, ge=1)
    """Most likely tokens to ask for at each position; the server may allow fewer."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at the same time."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest silence of the server within one request."""
    retries: int = Field(6, ge=0)
    """Further attempts of a request that found the server down, slow, busy or talking nonsense."""

    def problems(self) -> Iterator[str]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield "`url` must be http://HOST[:PORT]/v1 or https://..."
        if "@" in parts.netloc or parts.query or parts.fragment:  # it is written into knowledge.json
            yield "`url` must hold no credentials or query: name the key in `api_key_env`"


class JudgeSettings(Section):
    """What tells the domain of a generated text."""

    kind: Literal["classifier", "endpoint", "model"] = "classifier"
    """`classifier`: a small text classifier trained on the run's own prepared data, without network.
    `endpoint`: a model behind an API. `model`: a local model, by the likelihood of each name."""
    endpoint: Endpoint | None = None
    """endpoint: the server."""
    model: PlaceText | None = None
    """model: folder or hub name of a causal LM, better an instruction-tuned one."""
    batch_size: int = Field(8, ge=1)
    """model: texts judged at a time on each rank."""
    probe_texts: int = Field(300, ge=0)
    """classifier: samples of a domain that it learns from, by their words and their hidden states in the
    examined model; 0: words only, of more samples."""
    encoder: PlaceText | None = None
    """classifier: folder of a small embedding model (transformers, safetensors), as further features; null:
    all-MiniLM-L6-v2 where its package is installed (extra `judge`), else none."""
    topics: dict[str, list[str]] = Field(default_factory=dict)
    """classifier: what a domain is about, a phrase a topic, in place of those known for common names."""
    max_chars: int = Field(8000, ge=1)
    """Characters of each text that the judge reads; longer ones are cut and counted."""

    def problems(self) -> Iterator[str]:
        if self.kind == "endpoint" and self.endpoint is None:
            yield "kind endpoint needs a server: give `endpoint` with `url` and `model`"
        if self.kind == "model" and self.model is None:
            yield "kind model needs a local model: give its folder or hub name in `model`"
        if self.encoder is not None and self.probe_texts == 0:
            yield "encoder learns from `probe_texts` samples a domain: give more than 0"
        if 0 < self.probe_texts < MIN_PROBE_TEXTS:
            yield f"probe_texts: at least {MIN_PROBE_TEXTS} samples a domain, or 0 for words only"


class Detect(Section):
    """The base model's knowledge distribution (`versatune-ds detect`): VersaTune, phase 1."""

    model: PlaceText | None = None
    """Folder or hub name of the model to examine; default: `model.source`, with `model.weights`."""
    sequences: int = Field(2000, ge=1)
    """Texts to generate in each round."""
    rounds: int = Field(5, ge=1)
    """Rounds T: repetitions with other random numbers; how far they agree is reported."""
    max_new_tokens: int = Field(2048, ge=1)
    """Longest text in tokens (the paper's code: up to 16,000)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits before sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this probability; 1: from all."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens; 0: from all."""
    repetition_penalty: float = Field(1.1, gt=0)
    """Divides positive (multiplies negative) logits of tokens that stand in the text already; 1: none."""
    batch_size: int = Field(32, ge=1)
    """Texts generated at a time on each rank. It belongs to the random numbers: another one, other texts."""
    generator: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto`: vLLM if it is installed, on CUDA, in a single process; else transformers."""
    seed: int = Field(0, ge=0)
    """Seed of the texts, of the classifier's folds and of the bootstrap."""
    judge: JudgeSettings = JudgeSettings()
    """What tells the domain of each text."""
