"""`inspect`: what training will see, as text or a page: samples with what is trained on, lengths, packs.

Reads the token caches: what is shown is what is trained on. What the tokens are (thoughts, results of tools)
is found by rendering the raw rows again, where they are still there. On a terminal, what is trained on is
green, thoughts are magenta and results of tools are cyan; elsewhere, or when NO_COLOR is set, [[ ]] stand
around what is trained on and (( )) around what is not, where it has a name. Control characters are escaped,
so data cannot drive the terminal.

What is not covered: the batches of a run, which depend on the weights (`metrics.jsonl` records their shares);
packs shown here mix the domains as they lie in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from versatune_ds.apps.trace import TEXT, THOUGHT, TOOL, marked_runs, token_kinds
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.cache.units import SourceHashes, find_units
from versatune_ds.data.chat.conversation import Conversation, to_train
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import embedding_rows, load_tokenizer
from versatune_ds.data.plan.packing import pack_all
from versatune_ds.data.rows.files import TABLES, InputFile
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.data.rows.reasons import BadRow
from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.report.page import MarkedText, Page, PageSection, Stretch, Table, to_text

MAX_PACKED_SAMPLES = 20_000
"""Packs are shown for the first samples of each domain, up to this many in all: more would only take time."""
MAX_RAW_BYTES = 1 << 28
"""Of each file, where rows are looked up to tell what tokens are."""
HISTOGRAM_BINS = 8
BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#@"
COLOURS = {TEXT: "32", THOUGHT: "35", TOOL: "36"}
LEGEND = MarkedText(
    "",
    [
        Stretch("trained on", TEXT, 1.0),
        Stretch(" trained on with a weight", TEXT, 0.5),
        Stretch(" a thought that is trained on", THOUGHT, 1.0),
        Stretch(" a thought that is not", THOUGHT, 0.0),
        Stretch(" the result of a tool", TOOL, 0.0),
        Stretch(" other context", TEXT, 0.0),
    ],
)


class Paint:
    """Marks text: colours on a terminal, brackets elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.is_coloured = stream.isatty() and not os.environ.get("NO_COLOR")
        encoding = (getattr(stream, "encoding", None) or "ascii").lower()
        self.is_ascii = encoding.replace("-", "") != "utf8"

    def run(self, run: Stretch) -> str:
        weight = 0.0 if run.weight is None else run.weight
        name = f"{run.kind}: " if run.kind else ""
        share = "" if weight in (0, 1) else f"{weight:g}: "
        if self.is_coloured:
            style = COLOURS[run.kind] if weight else {THOUGHT: "2;35", TOOL: "36"}.get(run.kind, "")
            return f"\x1b[{style}m{share}{run.text}\x1b[0m" if style else run.text
        if weight:
            return f"[[{share}{name}{run.text}]]"
        return f"(({name}{run.text}))" if name else run.text

    def heading(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self.is_coloured else text


def to_lines(page: Page, stream: TextIO) -> Iterator[str]:
    """The page for a terminal or a file."""
    paint = Paint(stream)
    for section in page.sections:
        yield paint.heading(f"== {section.title}")
        yield from filter(None, (section.lead,))
        for text in section.texts:
            yield from [paint.heading(f"--- {text.title}")] if text.title else []
            yield "".join(map(paint.run, text.runs))
            yield ""
        for table in (*section.tables, *(fold.table for fold in section.folds if fold.table)):
            shown = to_text(table)
            yield shown.translate(str.maketrans(BARS, ASCII_BARS)) if paint.is_ascii else shown
            yield ""
        yield from section.notes


def inspect(config: Config, *, domain: str | None = None, samples: int = 3, packs: int = 2) -> Page:
    """A page about the prepared data of a configuration.

    Args:
        samples: samples to show per domain, evenly spread over it.

    Raises:
        ConfigError: an unknown domain.
        StateError: the data is not prepared.
    """
    names = config.domains.names
    if domain is not None and domain not in names:
        raise ConfigError(unknown_name("domain", domain, names))
    caches = open_caches(config, all_domains=False)
    chosen = {
        split: [c for c in members if c is not None and domain in (None, c.domain)]
        for split, members in caches.items()
    }
    sections = [PageSection("legend", "how to read", texts=[LEGEND])] if samples else []
    if samples:
        tokenizer = load_tokenizer(config)
        encoder = ChatEncoder.build(tokenizer, config.data.chat_template, embedding_rows(config))
        for cache in chosen["train"]:
            texts = _sample_texts(config, cache, spread(len(cache), samples), encoder, tokenizer)
            sections.append(PageSection(f"domain-{names.index(cache.domain)}", cache.domain, texts=texts))
    sections.append(PageSection("lengths", "lengths", tables=[_statistics(chosen)]))
    sections += _packs(chosen["train"], config.batch.pack_len, packs)
    return Page("What training sees", sections)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices (or all) evenly spread over `count` items, the first included."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _sample_texts(
    config: Config, cache: TokenCache, chosen: Sequence[int], encoder: ChatEncoder, tokenizer: Any
) -> list[MarkedText]:
    """Samples: where each comes from, its sizes, and its text marked."""
    kinds = _kinds(config, cache, chosen, encoder)
    texts = []
    for i in chosen:
        tokens, mask = cache.sample(i)
        path, number = cache.source_of(i)
        shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # safe to print
        sizes = f"{len(tokens):,} tokens, {int(cache.supervised[i]):,} supervised"
        runs = marked_runs(tokens, mask.astype(float), kinds.get(i) or [TEXT] * len(tokens), tokenizer)
        texts.append(MarkedText(f"{cache.domain} sample {i}: {shown}:{number}, {sizes}", runs))
    return texts


def _kinds(
    config: Config, cache: TokenCache, chosen: Sequence[int], encoder: ChatEncoder
) -> dict[int, list[str]]:
    """What the tokens of samples are, by sample; of those whose row is found again and is the same."""
    wanted: dict[tuple[str, int], list[int]] = {}
    for i in chosen:
        wanted.setdefault(cache.source_of(i), []).append(i)
    formats = {source["path"]: source["format"] for source in cache.manifest["sources"]}
    found: dict[int, list[str]] = {}
    units = find_units(config, encoder, SourceHashes(config.data.cache_dir).look_up)
    unit = next(unit for unit in units if unit.key == cache.manifest["key"])
    for file, _, source in unit.files:
        numbers = {number for path, number in wanted if path == file.path}
        schema = unit.schema(source.source)
        for place, row in _rows(file, numbers):
            try:
                content = schema.parse(row, formats[file.path], drop_nulls=file.kind in TABLES)
                if not isinstance(content, Conversation):
                    continue
                content = to_train(content, config.data.reasoning, config.data.train_on)
                kinds, (sample,) = token_kinds(encoder, content), encoder.encode([content])
            except BadRow:
                continue
            if isinstance(sample, BadRow):
                continue
            for i in wanted[file.path, place]:
                tokens = cache.sample(i)[0]
                for start in range(0, len(sample.tokens), config.batch.pack_len):  # it may be a piece of it
                    if np.array_equal(sample.tokens[start : start + len(tokens)], tokens):
                        found[i] = kinds[start : start + len(tokens)]
    return found


def _rows(file: InputFile, numbers: Collection[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of those rows of a file that lie near enough to its beginning."""
    if file.kind == "hub" or not numbers:
        return
    for block in read_blocks(file):
        if any(block.first <= number < block.first + block.num_rows for number in numbers):
            for place, row in decode_block(file, block):
                if place.number in numbers and isinstance(row, dict):
                    yield place.number, row
        if block.consumed > MAX_RAW_BYTES or block.first > max(numbers):
            return


def _statistics(chosen: dict[str, list[TokenCache]]) -> Table:
    """Lengths per split and domain, in tokens."""
    edges = _edges([cache for members in chosen.values() for cache in members])
    rows = []
    for split, members in chosen.items():
        for cache in members:
            p50, p95 = np.percentile(cache.lengths, [50, 95], method="nearest")
            counts, _ = np.histogram(cache.lengths, bins=edges)
            numbers = (len(cache), cache.num_tokens, p50, p95, int(cache.lengths.max()))
            cells = [f"{number:,}" for number in numbers]
            cells.insert(2, f"{cache.num_supervised / cache.num_tokens:.1%}")
            rows.append((f"{split} {cache.domain}", [*cells, f"|{bar(counts)}|"]))
    head = ["", "samples", "tokens", "supervised", "p50", "p95", "max", f"{edges[0]:,} .. {edges[-1]:,}"]
    return Table(head, rows)


def _edges(caches: Sequence[TokenCache]) -> npt.NDArray[np.int64]:
    """Bin edges, each about the same factor apart, over the lengths of all caches."""
    low = min(int(cache.lengths.min()) for cache in caches) if caches else 1
    high = max(int(cache.lengths.max()) for cache in caches) + 1 if caches else 2
    edges = np.geomspace(low, high, HISTOGRAM_BINS + 1).round().astype(np.int64)
    return np.unique(edges)


def bar(counts: npt.NDArray[np.int64]) -> str:
    """One character per bin, its height the bin's share of the largest one; only empty bins are blank."""
    top = max(1, int(counts.max()))
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // top)] for count in counts)


def _packs(caches: Sequence[TokenCache], pack_len: int, wanted: int) -> list[PageSection]:
    """How samples fill packs: efficiency, and what lies in the first packs."""
    if not caches or wanted == 0:
        return []
    share = max(1, MAX_PACKED_SAMPLES // len(caches))
    lengths = np.concatenate([cache.lengths[:share] for cache in caches])
    domains = [cache.domain for cache in caches for _ in range(min(share, len(cache)))]
    packs = pack_all(lengths, pack_len)
    total = sum(len(cache) for cache in caches)
    of = "" if total == len(lengths) else f" (the first {len(lengths):,} of {total:,})"
    filled = lengths.sum() / (len(packs) * pack_len)
    lead = f"{len(lengths):,} samples{of} fill {len(packs):,} packs of {pack_len:,} tokens to {filled:.2%}"
    lines = []
    for i in spread(len(packs), wanted):
        members = " + ".join(f"{domains[s]} {lengths[s]}" for s in packs[i][:12])
        more = f" + {len(packs[i]) - 12} more" if len(packs[i]) > 12 else ""
        lines.append(
            f"pack {i}: {lengths[packs[i]].sum():,} tokens in {len(packs[i])} samples: {members}{more}"
        )
    return [PageSection("packs", "packs", lead, notes=lines)]
