"""Held-out samples that the model answers itself, and its scored answers (`evaluation.generate`).

A question is the context of a held-out sample up to its last supervised turn, as the chat template rendered
it for training: the very token ids of the cache. That turn is the reference. Decoding is greedy and ends at
the turn's stop token. Which samples are asked depends on the held-out data alone, so answers can be compared
over steps, runs and models.

The batches are the same on any number of ranks, which share them out; under ZeRO-3 they generate in step.
Scores come from rank 0.

What is not covered: decoding (`decoding.py`), scores (`scoring.py`), packs that ranks share (refused in
`config/schema.py`), and rows that `data.overlong: split` cut within their prompt.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import GenerationConfig

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.data.encode.chat_encoder import stop_token
from versatune_ds.data.plan.order import Permutation
from versatune_ds.domain.evaluation import scores_by_domain
from versatune_ds.engine.answers.decoding import continuations, cut_text, generating
from versatune_ds.engine.answers.scoring import Score, build_scorer, checked, try_on_reference
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.phases import phase
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import is_blank

log = get_logger(__name__)

MAX_PROMPT_CHARS = 1000
"""Of a question's end, what is recorded."""
NO_PROMPT, CUT, TOO_LONG, BLANK = "nothing to ask", "cut by data.overlong", "too long", "blank"


@dataclass(frozen=True)
class Question:
    """What is asked of a held-out sample."""

    domain: str
    source: str
    """Where its row is: path:line."""
    prompt: tuple[int, ...]
    """Token ids before the last supervised turn."""
    reference: str
    """That turn, without its stop token."""


@dataclass(frozen=True)
class ScoredAnswer:
    """A line of answers.jsonl, without its step."""

    domain: str
    source: str
    prompt: str
    """Its last characters."""
    answer: str
    reference: str
    score: float | None
    """0 to 1; None: the user's function failed."""
    tokens: int
    finished: bool
    """Whether the model ended its answer; False: it was cut at max_new_tokens."""


@dataclass(frozen=True)
class AnswerScores:
    """All answers of an evaluation, the same on all ranks."""

    answers: tuple[ScoredAnswer, ...] = ()
    seconds: float | None = None
    """None: nothing was asked."""

    def lines(self, step: int) -> list[dict[str, Any]]:
        """Of answers.jsonl."""
        return [{"step": step, **dataclasses.asdict(answer)} for answer in self.answers]

    def by_domain(self) -> dict[str, list[float]]:
        """The scores of each domain that is asked, without those that are not known."""
        return scores_by_domain((answer.domain, answer.score) for answer in self.answers)

    def means(self) -> dict[str, float | None]:
        """Mean score of each domain that is asked; None without any score."""
        scores = self.by_domain()
        return {name: math.fsum(of) / len(of) if of else None for name, of in scores.items()}

    def counts(self) -> dict[str, int]:
        """Scored answers of each domain that is asked."""
        return {name: len(scores) for name, scores in self.by_domain().items()}


class Questions:
    """What is asked at every evaluation, chosen and tried once; every rank makes it.

    Args:
        config: with `evaluation.generate`.
        caches: held-out cache by domain name, None for a domain that is not evaluated.
        tokenizer: with the run's chat template set.

    Raises:
        ConfigError: a score that cannot be used.
        DataError: a domain has no sample that can be asked.
    """

    def __init__(
        self, config: Config, caches: Mapping[str, TokenCache | None], tokenizer: Any, architecture: Any
    ) -> None:
        assert config.evaluation.generate is not None
        self.settings, self.tokenizer = config.evaluation.generate, tokenizer
        stop = tokenizer.convert_tokens_to_ids(stop_token(tokenizer, config.data.chat_template))
        self.ends = sorted({stop, tokenizer.eos_token_id} - {None})
        positions = getattr(architecture, "max_position_embeddings", None) or math.inf
        self._longest_prompt = positions - self.settings.max_new_tokens
        self._pack_len = config.batch.pack_len
        asked = {name: cache for name, cache in caches.items() if self.settings.score_of(name)}
        self.questions = [
            question
            for number, name in enumerate(caches)
            if (cache := asked.get(name)) is not None
            for question in self._choose(number, name, cache)
        ]
        lacking = sorted(self.settings.named - {question.domain for question in self.questions})
        if lacking:
            raise DataError(f"evaluation.generate.score names {', '.join(lacking)}, without held-out data")
        self._scorers = distributed.together(self._build_scorers, asked)

    def _choose(self, number: int, name: str, cache: TokenCache) -> list[Question]:
        order = Permutation(len(cache), seed=0, domain=number, pass_index=0).slice(0, len(cache))
        left_out: Counter[str] = Counter()
        found: list[Question] = []
        for index in map(int, order):
            if len(found) == self.settings.samples:
                break
            asked = self._ask(name, cache, index)
            if isinstance(asked, str):
                left_out[asked] += 1
            else:
                found.append(asked)
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        if not found:
            raise DataError(
                f"evaluation.generate: none of the {len(cache)} held-out samples of {name} can be asked "
                f"({why}); a sample needs a prompt and a whole answer, and the model positions for the "
                "prompt and evaluation.generate.max_new_tokens"
            )
        if len(found) < self.settings.samples:
            log.info("%s: %d held-out samples are asked; left out: %s", name, len(found), why or "none")
        lengths = (len(self.tokenizer(q.reference, add_special_tokens=False)["input_ids"]) for q in found)
        longer = sum(length > self.settings.max_new_tokens for length in lengths)
        if longer:
            log.info(
                "%s: %d of %d references are longer than evaluation.generate.max_new_tokens",
                name,
                longer,
                len(found),
            )
        return found

    def _ask(self, name: str, cache: TokenCache, index: int) -> Question | str:
        """The question of a sample, or why there is none."""
        tokens, weights = cache.sample(index)
        start, stop = last_supervised(weights)
        place = cache.source_of(index)
        if index > 0 and cache.source_of(index - 1) == place:  # a later part of a row that was split
            return CUT
        if stop == len(tokens) >= self._pack_len and tokens[-1] not in self.ends:
            return CUT
        if start == 0:
            return NO_PROMPT
        if start > self._longest_prompt:
            return TOO_LONG
        reference = cut_text(self.tokenizer, tokens[start:stop].tolist(), self.ends).text
        if is_blank(reference):
            return BLANK
        return Question(name, ":".join(map(str, place)), tuple(tokens[:start].tolist()), reference)

    def _build_scorers(self, caches: Mapping[str, TokenCache | None]) -> dict[str, Score]:
        """By domain, tried on every reference; on rank 0, which alone scores."""
        if not distributed.is_main():
            return {}
        scorers: dict[str, Score] = {}
        for question in self.questions:
            name, domain = self.settings.score_of(question.domain), question.domain
            cache = caches[domain]
            assert name is not None and cache is not None
            if domain not in scorers:
                scorers[domain] = build_scorer(name, domain, partial(self._references, cache))
            try_on_reference(scorers[domain], name, question.source, question.reference)
        return scorers

    def _references(self, cache: TokenCache) -> Iterator[str]:
        """The last supervised turn of every sample."""
        for index in range(len(cache)):
            tokens, weights = cache.sample(index)
            start, stop = last_supervised(weights)
            yield cut_text(self.tokenizer, tokens[start:stop].tolist(), self.ends).text

    def ask(self, backend: Backend) -> AnswerScores:
        """Let the model answer all of them; a collective."""
        began = time.perf_counter()
        tokens = self._generate(backend)
        answers = distributed.on_main(self._score, tokens)
        return AnswerScores(tuple(answers), time.perf_counter() - began)

    def _generate(self, backend: Backend) -> dict[int, list[int]]:
        """New ids by the number of the question."""
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],  # fills rows that ended; cut off again
            use_cache=True,
        )
        in_step = backend.layout["ZeRO stage"] == 3 and backend.ranks.size > 1
        # rotary positions that depend on length are for one sample at a time (`engine/model/rope.py`)
        together = 1 if backend.model.rotary else self.settings.batch_size
        by_length = sorted(range(len(self.questions)), key=lambda i: (-len(self.questions[i].prompt), i))
        batches = [by_length[i : i + together] for i in range(0, len(by_length), together)]
        rank, size = backend.ranks.dp
        mine = batches[rank::size]
        mine += batches[:1] * (math.ceil(len(batches) / size) - len(mine))  # ranks get equally many
        found: dict[int, list[int]] = {}
        with backend.evaluating():
            for i, batch in enumerate(mine):
                rows = [self.questions[number].prompt for number in batch]
                place = f"of batch {i + 1} of {len(mine)}"
                with phase("answers", detail=place), generating(backend.model) as lm:
                    tokens = continuations(lm, rows, settings, backend.device, in_step)
                found |= zip(batch, tokens, strict=True)
        return dict(pair for of_rank in distributed.gather_objects(found) for pair in of_rank.items())

    def _score(self, tokens: Mapping[int, Sequence[int]]) -> list[ScoredAnswer]:
        """The answers in the order of the questions; on rank 0."""
        failures: list[str] = []
        answers = []
        for number, question in enumerate(self.questions):
            said = cut_text(self.tokenizer, tokens[number], self.ends)
            score = None
            try:
                score = checked(self._scorers[question.domain], said.text, question.reference)
            except Exception as error:  # whatever the user's code raises
                failures.append(f"{question.source}: {type(error).__name__}: {error}")
            prompt = self.tokenizer.decode(question.prompt, skip_special_tokens=True)
            known = (question.domain, question.source, prompt[-MAX_PROMPT_CHARS:], said.text)
            answers.append(ScoredAnswer(*known, question.reference, score, said.num_tokens, said.finished))
        if failures:
            log.warning("%d answers have no score; the first: %s", len(failures), failures[0])
        return answers


def ask(backend: Backend, questions: Questions | None) -> AnswerScores:
    """The scored answers, none where nothing is to be asked; a collective."""
    return AnswerScores() if questions is None else questions.ask(backend)


def last_supervised(weights: np.ndarray) -> tuple[int, int]:
    """[start, stop) of the last run of tokens with a weight above 0; a sample has one."""
    labels = np.flatnonzero(weights > 0)
    gaps = np.flatnonzero(np.diff(labels) > 1)
    return int(labels[gaps[-1] + 1] if len(gaps) else labels[0]), int(labels[-1]) + 1
