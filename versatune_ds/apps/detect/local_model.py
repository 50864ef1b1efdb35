"""A local causal LM as the judge: the likelihood of each domain's name as the answer to a question.

    log p(name | question) = sum of the log-probabilities of the tokens of the name

The whole name counts, however many tokens it has. A model likes some names whatever it is asked; what it says
of texts without content is taken off (contextual calibration, Zhao et al., ICML 2021), so that a name that is
long or rare does not pay for it:

    p(domain) = softmax over the names of  log p(name | question) - log prior(name)

prior: the mean over `CONTENT_FREE` of the names' probabilities, scaled to 1. The question is computed once
for a batch of texts; its KV cache is repeated for the names that have more than one token.

With a chat template in its tokenizer the model is asked as in a conversation, else in plain text.

What is not covered: models larger than one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from versatune_ds.apps.detect.generate import load_model, load_text_tokenizer, subject_fingerprint
from versatune_ds.apps.detect.judge import PLAIN_ENDING, PROMPT_VERSION, Judgement, question
from versatune_ds.config.model import Model
from versatune_ds.engine.answers.decoding import pad_left
from versatune_ds.foundations.errors import ConfigError

CONTENT_FREE = ("", "N/A", "[MASK]")


class ModelJudge:
    """See the module docstring.

    Args:
        settings: `source`, `dtype` and `trust_remote_code` of the judge.
        batch_size: texts at a time on each rank.

    Raises:
        ConfigError: the model cannot be loaded, or lacks weights.
    """

    on_every_rank = True

    def __init__(self, names: Sequence[str], settings: Model, batch_size: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.settings = settings
        self.texts_at_once = batch_size
        self.device = device
        self.fingerprint = subject_fingerprint(settings, seed=0)
        self.tokenizer = load_text_tokenizer(settings)
        self.model: Any = None
        self.log_prior: np.ndarray = np.zeros(len(self.names))

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "model",
            "model": self.settings.source,
            "fingerprint": self.fingerprint,
            "prompt_version": PROMPT_VERSION,
            "calibrated_on": list(CONTENT_FREE),
        }

    def facts(self) -> dict[str, Any]:
        prior = dict(zip(self.names, np.exp(self.log_prior).tolist(), strict=True))
        return {"asked_as": "chat" if self._has_template else "plain text", "prior_taken_off": prior}

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def open(self) -> None:
        self.model = load_model(self.settings, 0, self.device)
        self.log_prior = log_prior(self._name_logs(CONTENT_FREE))

    def judge(self, texts: Sequence[tuple[int, str]]) -> Iterator[Judgement]:
        logs = self._name_logs([text for _, text in texts])
        for (index, _), row, lifted in zip(texts, logs, logs - self.log_prior, strict=True):
            if np.isfinite(lifted).all():
                yield Judgement(index, softmax(lifted), None, float(min(1.0, np.exp(row).sum())))
            else:
                yield Judgement(index, None, "the judge's probabilities are not finite")

    def _name_logs(self, texts: Sequence[str]) -> np.ndarray:
        """log p(name | question) of each text: float64[n, k]."""
        prompts, answers = zip(*(self._encode(text) for text in texts), strict=True)
        needed = max(len(p) + max(map(len, a)) for p, a in zip(prompts, answers, strict=True))
        positions = getattr(self.model.config, "max_position_embeddings", needed)
        if needed > positions:
            raise ConfigError(
                f"a question to the judge has {needed} tokens, and {self.settings.source} has {positions} "
                "positions; lower detect.judge.max_chars"
            )
        return name_log_probabilities(self.model, list(prompts), list(answers))

    def close(self) -> None:
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, text: str) -> tuple[list[int], list[list[int]]]:
        """Ids of the question, and of each name behind it."""
        asked, chats = question(text, self.names), self._has_template
        prompt = asked + PLAIN_ENDING
        if chats:
            messages = [{"role": "user", "content": asked}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        names = (name if chats else f" {name}" for name in self.names)
        return self._ids(prompt, not chats), [self._behind(prompt, name) for name in names]

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _behind(self, prompt: str, name: str) -> list[int]:
        """Ids of a name behind the prompt: of both together where that leaves the prompt's ids alone."""
        alone = self._ids(prompt, False)
        together = self._ids(prompt + name, False)
        if together[: len(alone)] == alone and len(together) > len(alone):
            return together[len(alone) :]
        return self._ids(name, False)


def log_prior(logs: np.ndarray) -> np.ndarray:
    """float64[k]: log of the mean over texts of the probabilities among the names; logs: float64[n, k]."""
    prior: np.ndarray = np.log(softmax(logs, axis=1).mean(axis=0))
    return prior


@torch.inference_mode()
def name_log_probabilities(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[list[list[int]]]
) -> np.ndarray:
    """Log-probability of each answer behind its prompt: float64[n, k], nats.

    Args:
        prompts: n lists of ids, each at least one.
        answers: for every prompt k lists of ids, each at least one.
    """
    device = model.device
    k = len(answers[0])
    ids, mask = pad_left(prompts)
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        asked = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = model(**asked, use_cache=True, logits_to_keep=1)
        first = out.logits[:, -1].float().log_softmax(-1).repeat_interleave(k, 0)  # [n * k, V]
        flat = [tokens for row in answers for tokens in row]
        longest = max(map(len, flat))
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in flat], device=device)
        given = torch.tensor([[i < len(tokens) for i in range(longest)] for tokens in flat], device=device)
        total = first.gather(1, padded[:, :1]).squeeze(1).double()
        if longest > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(k)
            step = padded[:, :-1]  # [n * k, longest - 1]
            behind = positions[:, -1:].repeat_interleave(k, 0) + 1
            logits = model(
                input_ids=step,
                attention_mask=torch.cat([mask.repeat_interleave(k, 0), given[:, :-1].long()], 1),
                position_ids=behind + torch.arange(longest - 1, device=device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            rest = logits.float().log_softmax(-1).gather(2, padded[:, 1:, None]).squeeze(2).double()
            total += torch.where(given[:, 1:], rest, 0.0).sum(1)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the judge's device is out of memory; lower detect.judge.batch_size or max_chars"
        ) from error
    return total.reshape(-1, k).cpu().numpy()
