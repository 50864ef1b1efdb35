"""How many rows of logits the chunked backend holds at a time.

Two buffers decide the transient memory of a training call, with V and H of the head and 16-bit
weights:

    chunk of C rows     C * V * 6 bytes   (fp32 logits, turned into gradients in place, and their
                                           16-bit copy for the matrix products)
    weight gradient     V * H * 4 bytes   (fp32 sum over the chunks)

The second is there whatever C is, so a C for which the first is no larger at most doubles the
total, while fewer and larger chunks mean fewer passes over the weight gradient (each chunk reads
and writes all of it). Equal sizes: C = 2H / 3; V cancels.

Worked number: the head of a 32B model, H = 5120, V = 152064, N = 8192. C = 3413, rounded down to
3328 rows. 8192 rows are then 3 chunks of 2816 rows: 2816 * 152064 * 6 = 2.57e9 bytes beside a
gradient buffer of 152064 * 5120 * 4 = 3.11e9 bytes. All rows at once would be 7.47e9 bytes.

What is not covered: measured throughput. The rule is about memory and has not been tuned on a GPU.
"""

from versatune_kernels.errors import KernelError

ROW_MULTIPLE = 128
"""Chunks are multiples of this, the usual tile height of a matrix product."""

MAX_CHUNK_ELEMENTS = 2**31 - 1
"""A chunk stays below it, so that its elements can be addressed with 32-bit integers."""


def auto_chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Rows per chunk for `num_tokens` valid tokens. See the head of this file for the reason.

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
    rows = -(-num_tokens // num_chunks)
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def resolve_chunk_tokens(
    chunk_tokens: int | str, num_tokens: int, hidden_size: int, vocab_size: int
) -> int:
    """`chunk_tokens` as a number of rows: the caller's own, or the rule's for "auto".

    Raises:
        KernelError: neither "auto" nor an integer >= 1.
    """
    if chunk_tokens == "auto":
        return auto_chunk_tokens(num_tokens, hidden_size, vocab_size)
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise KernelError(
            f"chunk_tokens={chunk_tokens!r}: expected 'auto' or a number of tokens >= 1. "
            "Smaller chunks need less memory; 'auto' is a good start."
        )
    return chunk_tokens
