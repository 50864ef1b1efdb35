"""How many rows of logits are held at a time.

Two buffers decide the transient memory of a training call, with V and H of the head:

    chunk of C rows     C * V * L bytes    L = 4 for fp32 logits (their gradient takes their place),
                                           2 for 16-bit logits (`triton`)
    weight gradient     V * H * 4 bytes    fp32 sum over the chunks, where one is kept

`chunked` always keeps the sum. Fewer and larger chunks mean fewer passes over it; a chunk may take
two thirds of its memory, C = 2H / 3 (V cancels). Worked number, the head of a 32B model (H 5120,
V 152064), N 8192: C <= 3413, rounded down to 3328; 8192 rows are 3 chunks of 2816: 1.71e9 bytes
beside a sum of 3.11e9.

`triton` keeps a sum in fp32 only above MAX_ROUNDED_SUMS chunks. The error of a weight gradient that
is rounded to bf16 after each chunk, measured against fp64: 0.164 % with 1 chunk, 0.190 with 2,
0.235 with 4, 0.298 with 8, 0.538 with 32; a sum in fp32 stays at 0.164. One chunk rounds once and
passes once over everything; a chunk of 2H rows of 16-bit logits is as large as the fp32 sum that it
saves. So C <= max(2H, 8192) rows of 16-bit logits, or half as many of fp32 logits. Same head, fp32
logits: up to 5120 rows are one chunk of <= 3.11e9 bytes; 8192 rows are 2 chunks of 4096 (2.49e9
bytes). Rows that would need more than MAX_ROUNDED_SUMS chunks, and so an fp32 sum, may have chunks that
are larger by that sum's memory, if they then need none: 32,768 rows are 4 chunks of 8448 (5.14e9 bytes)
and not 7 beside a sum of 3.11e9, which each chunk but the first reads and writes: of the weight's
gradient they move 11 GB and not 45. Among the sizes that need the fewest chunks, the one whose product
for the hidden gradient fills the multiprocessors best is taken: tiles of 128 x 256, C 4096: 32 * 20 =
640 tiles on 132 multiprocessors are 5 waves, 97 % full.

What is not covered: measured throughput. The rules are arithmetic and have not been tuned on a GPU.
"""

from typing import NamedTuple

import torch

from versatune_kernels.contract import Spec

ROW_MULTIPLE = 128
"""Chunks are multiples of this, the usual tile height of a matrix product."""

COLUMN_TILE = 256
"""The usual tile width of a matrix product."""

MAX_CHUNK_ELEMENTS = 2**31 - 1
"""A chunk chosen here stays below it. (A larger one asked for by number works on `triton`.)"""

MAX_ROUNDED_SUMS = 4
"""Up to so many chunks the weight gradient is summed in its own 16-bit dtype."""

SINGLE_CHUNK_ROWS = 8192
"""Rows of 16-bit logits that one chunk may always have (half as many of fp32 logits)."""

ROW_ALIGNMENT = 64
"""Rows of logits of `triton` start at multiples of so many elements: cuBLAS wants 16 bytes."""

DEFAULT_MULTIPROCESSORS = 132
"""Of an H100 or H200; where there is no GPU to ask."""


class ChunkPlan(NamedTuple):
    """How `triton` goes through its rows."""

    rows: int
    """C >= 1."""
    fp32_sum: bool
    """Whether the weight gradient of 16-bit weights is summed in fp32."""


def row_stride(vocab_size: int) -> int:
    """Elements from one row of logits of `triton` to the next."""
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


def auto_chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Rows per chunk of `chunked`. See the head of this file for the reason.

    More than 128 tokens are always at least two chunks, so no tensor ever has
    `num_tokens * vocab_size` elements. The chunks of a call have about the same size.

    Args:
        num_tokens: n >= 0, tokens whose label is not ignored.
        hidden_size: H >= 1.
        vocab_size: V >= 1.
    """
    largest = max(2 * hidden_size // 3, ROW_MULTIPLE)
    largest = min(largest, max(MAX_CHUNK_ELEMENTS // vocab_size, 1))
    largest = max(largest // ROW_MULTIPLE * ROW_MULTIPLE, ROW_MULTIPLE)
    if num_tokens <= ROW_MULTIPLE:
        return ROW_MULTIPLE
    num_chunks = max(-(-num_tokens // largest), 2)
    return _round_up(-(-num_tokens // num_chunks))


def triton_chunks(
    spec: Spec,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
) -> ChunkPlan:
    """C of `triton` and how it sums the weight gradient.

    Args:
        spec: what the caller asked for.
        num_tokens: n.
        hidden_size: H.
        vocab_size: V.
        dtype: of the weight. The gradients of fp16 are not normalized before backward and could
            overflow: their sum is always fp32.
        multiprocessors: of the GPU.
    """
    logit_size = 4 if spec.logits_dtype == "fp32" else dtype.itemsize
    cap = max(MAX_CHUNK_ELEMENTS // vocab_size, 1)
    widest = min(max(2 * hidden_size, SINGLE_CHUNK_ROWS) * 2 // logit_size, cap)
    saved = spec.grad_weight and dtype == torch.bfloat16
    wider = min(widest + (4 * hidden_size // logit_size if saved else 0), cap)
    if MAX_ROUNDED_SUMS * widest < num_tokens <= MAX_ROUNDED_SUMS * (wider // ROW_MULTIPLE * ROW_MULTIPLE):
        widest = wider
    rows = spec.chunk_tokens or _fullest(num_tokens, widest, hidden_size, multiprocessors)
    few = -(-num_tokens // rows) <= MAX_ROUNDED_SUMS
    fp32_sum = spec.grad_weight and (dtype == torch.float16 or (dtype == torch.bfloat16 and not few))
    return ChunkPlan(rows, fp32_sum)


def _fullest(num_tokens: int, limit: int, hidden_size: int, multiprocessors: int) -> int:
    """Rows <= limit of equal chunks, as few as possible, that waste the least of the last waves."""
    if num_tokens <= limit:
        return max(num_tokens, 1)
    if limit < ROW_MULTIPLE:
        return limit
    num_chunks = -(-num_tokens // (limit // ROW_MULTIPLE * ROW_MULTIPLE))
    smallest = _round_up(-(-num_tokens // num_chunks))

    def waves(rows: int) -> int:
        tiles = -(-rows // ROW_MULTIPLE) * -(-hidden_size // COLUMN_TILE)
        return -(-tiles // multiprocessors)

    def total_waves(rows: int) -> int:
        return num_tokens // rows * waves(rows) + waves(num_tokens % rows)

    return min(range(smallest, limit + 1, ROW_MULTIPLE), key=lambda rows: (total_waves(rows), rows))


def _round_up(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
