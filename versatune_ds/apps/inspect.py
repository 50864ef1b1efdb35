"""`inspect`: what training will see, as text: samples with their supervised part marked, lengths, packs.

Reads the token caches, not the raw files: what is shown is what is trained on. On a terminal the supervised
part is green; elsewhere, or when NO_COLOR is set, it stands in [[ ]]. Control characters are escaped, so data
cannot drive the terminal.

What is not covered: the batches of a run, which depend on the weights (`metrics.jsonl` records their shares);
packs shown here mix the domains as they lie in the cache.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.data.plan.packing import pack_all
from versatune_ds.foundations.errors import ConfigError, unknown_name

MAX_PACKED_SAMPLES = 20_000
"""Packs are shown for the first samples of each domain, up to this many in all: more would only take time."""
HISTOGRAM_BINS = 8
BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#@"


class Paint:
    """Marks text: colours on a terminal, brackets elsewhere.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.is_coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        encoding = (getattr(stream, "encoding", None) or "ascii").lower()
        self.bars = BARS if encoding.replace("-", "") == "utf8" else ASCII_BARS

    def supervised(self, text: str) -> str:
        """Text that is trained on."""
        return f"\x1b[32m{text}\x1b[0m" if self.is_coloured else f"[[{text}]]"

    def heading(self, text: str) -> str:
        """A line above a sample."""
        return f"\x1b[1m{text}\x1b[0m" if self.is_coloured else text


def inspect(
    config: Config,
    stream: TextIO,
    *,
    domain: str | None = None,
    samples: int = 3,
    packs: int = 2,
    config_path: Path | None = None,
) -> Iterator[str]:
    """Lines about the prepared data of a configuration.

    Args:
        config: the run's settings.
        stream: where the lines will go; decides about colours.
        domain: only this one.
        samples: samples to show per domain, evenly spread over it.
        packs: packs to show.
        config_path: for error texts.

    Raises:
        ConfigError: an unknown domain.
        StateError: the data is not prepared.
    """
    names = config.domains.names
    if domain is not None and domain not in names:
        raise ConfigError(unknown_name("domain", domain, names))
    caches = open_caches(config, config_path=config_path)
    paint = Paint(stream)
    chosen = {
        split: [c for c in members if c is not None and domain in (None, c.domain)]
        for split, members in caches.items()
    }
    tokenizer = load_tokenizer(config)
    for cache in chosen["train"] if samples else []:
        for i in spread(len(cache), samples):
            yield from sample_lines(cache, i, tokenizer, paint)
    yield from statistics_lines(chosen, paint)
    yield from pack_lines(chosen["train"], config.batch.pack_len, packs)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices (or all) evenly spread over `count` items, the first included."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def sample_lines(cache: TokenCache, i: int, tokenizer: Any, paint: Paint) -> Iterator[str]:
    """A sample: where it comes from, its sizes, and its text with the supervised part marked."""
    tokens, mask = cache.sample(i)
    path, number = cache.source_of(i)
    shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # safe to print
    yield paint.heading(
        f"--- {cache.domain} sample {i}: {shown}:{number}, {len(tokens):,} tokens, "
        f"{int(cache.supervised[i]):,} supervised"
    )
    yield "".join(
        paint.supervised(escape(piece)) if is_supervised else escape(piece)
        for piece, is_supervised in pieces(tokens, mask, tokenizer)
    )
    yield ""


def pieces(
    tokens: npt.NDArray[np.uint32], mask: npt.NDArray[np.bool_], tokenizer: Any
) -> Iterator[tuple[str, bool]]:
    """The sample's text in runs of equal mask: (text, supervised?).

    Whole beginnings are decoded and compared, because decoders drop a space in front of what they are given.
    """
    decode = functools.partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    ends = [*(np.flatnonzero(mask[1:] != mask[:-1]) + 1), len(tokens)]
    before, start = "", 0
    for end in ends:
        text = decode(tokens[:end].tolist())
        run = text[len(before) :] if text.startswith(before) else decode(tokens[start:end].tolist())
        yield run, bool(mask[start])
        before, start = text, int(end)


def escape(text: str) -> str:
    """Text without control, format and unassigned characters (they become \\x.., \\u....); newlines stay."""
    return "".join(
        c if c == "\n" or not unicodedata.category(c).startswith("C") else ascii(c)[1:-1] for c in text
    )


def statistics_lines(chosen: dict[str, list[TokenCache]], paint: Paint) -> Iterator[str]:
    """Length statistics per split and domain; lengths in tokens."""
    edges = _edges([cache for members in chosen.values() for cache in members])
    head = f"{'split':<6}{'domain':<14}{'samples':>10}{'tokens':>14}{'supervised':>12}"
    yield f"{head}{'p50':>8}{'p95':>8}{'max':>8}  lengths {edges[0]:,} .. {edges[-1]:,}"
    for split, members in chosen.items():
        for cache in members:
            p50, p95 = np.percentile(cache.lengths, [50, 95], method="nearest")
            counts, _ = np.histogram(cache.lengths, bins=edges)
            yield (
                f"{split:<6}{cache.domain:<14}{len(cache):>10,}{cache.num_tokens:>14,}"
                f"{cache.num_supervised / cache.num_tokens:>12.1%}{p50:>8,}{p95:>8,}"
                f"{int(cache.lengths.max()):>8,}  |{bar(counts, paint.bars)}|"
            )


def _edges(caches: Sequence[TokenCache]) -> npt.NDArray[np.int64]:
    """Bin edges, each about the same factor apart, over the lengths of all caches."""
    low = min(int(cache.lengths.min()) for cache in caches) if caches else 1
    high = max(int(cache.lengths.max()) for cache in caches) + 1 if caches else 2
    edges = np.geomspace(low, high, HISTOGRAM_BINS + 1).round().astype(np.int64)
    return np.unique(edges)


def bar(counts: npt.NDArray[np.int64], bars: str = BARS) -> str:
    """One character per bin, its height the bin's share of the largest one; only empty bins are blank."""
    top = max(1, int(counts.max()))
    return "".join(bars[-(-int(count) * (len(bars) - 1) // top)] for count in counts)


def pack_lines(caches: Sequence[TokenCache], pack_len: int, wanted: int) -> Iterator[str]:
    """How samples fill packs: efficiency, and what lies in the first packs."""
    if not caches or wanted == 0:
        return
    share = max(1, MAX_PACKED_SAMPLES // len(caches))
    lengths = np.concatenate([cache.lengths[:share] for cache in caches])
    domains = [cache.domain for cache in caches for _ in range(min(share, len(cache)))]
    packs = pack_all(lengths, pack_len)
    total = sum(len(cache) for cache in caches)
    of = "" if total == len(lengths) else f" (the first {len(lengths):,} of {total:,})"
    yield ""
    yield (
        f"{len(lengths):,} samples{of} fill {len(packs):,} packs of {pack_len:,} tokens to "
        f"{lengths.sum() / (len(packs) * pack_len):.2%}"
    )
    for i in spread(len(packs), wanted):
        members = " + ".join(f"{domains[s]} {lengths[s]}" for s in packs[i][:12])
        more = f" + {len(packs[i]) - 12} more" if len(packs[i]) > 12 else ""
        yield f"pack {i}: {lengths[packs[i]].sum():,} tokens in {len(packs[i])} samples: {members}{more}"
