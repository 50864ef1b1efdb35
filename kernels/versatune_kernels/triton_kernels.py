"""The four Triton kernels: tokens with a label, rows of logits, segments of tokens, scaled gradients.

    tokens_kernel    one program: the tokens that carry a label in front, and what may be wrong with values
    row_kernel       one program per row: loss, then the gradient of the logits in place
    segment_kernel   one program per sample: count, sum and sum of squares in float64
    scale_kernel     the last step of backward: gradient * upstream, rounded once

How: every program owns what it writes and visits its input in a fixed order, so there are no
atomics and ten runs are bitwise equal. Offsets of rows are 64-bit; a chunk may hold more than 2^31
logits. Every element of every output is written, also for rows without a target.

Importing this module imports Triton. Whether its interpreter runs the kernels (TRITON_INTERPRET=1)
is decided by Triton at that moment.

What is not covered: matrix products (cuBLAS does them better), tuning of tile sizes on a GPU.
"""

# mypy: ignore-errors
# Triton compiles these functions; their annotations are Triton's, not Python's.

import triton
import triton.language as tl


@triton.jit
def tokens_kernel(
    labels_ptr,
    ids_ptr,
    token_weight_ptr,
    normalizer_ptr,
    index_ptr,
    kept_labels_ptr,
    kept_weight_ptr,
    inverse_ptr,
    nonzero_ptr,
    holds_ptr,
    num_tokens,
    num_rows,
    ignore_index,
    vocab_size,
    num_segments,
    HAS_IDS: tl.constexpr,
    HAS_TOKEN_WEIGHT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first num_rows of: tokens with a label in their order, then the others in theirs. All: as they are.

    labels and ids int32 or int64 [N]; token_weight floating [N]; normalizer fp64 []. Written for each row:
    index int64, kept_labels int64, kept_weight fp32, all [num_rows]. inverse fp32 [], 1 / normalizer or 0;
    nonzero and holds fp32 [], 1 or 0: whether the normalizer is not 0, and whether all that `checks.py` asks
    of values holds, with num_rows tokens that carry a label.
    """
    counts = tl.zeros([TILE], tl.int32)
    bad = tl.zeros([TILE], tl.int32)
    start = 0
    while start < num_tokens:
        tokens = start + tl.arange(0, TILE)
        inside = tokens < num_tokens
        labels = tl.load(labels_ptr + tokens, mask=inside, other=0)
        valid = inside & (labels != ignore_index)
        counts += valid.to(tl.int32)
        bad += (valid & ((labels < 0) | (labels >= vocab_size))).to(tl.int32)
        if HAS_IDS:
            bad += (tl.load(ids_ptr + tokens, mask=inside, other=-1) >= num_segments).to(tl.int32)
        start += TILE
    num_valid = tl.sum(counts, 0)

    start = 0
    seen = 0
    while start < num_tokens:
        tokens = start + tl.arange(0, TILE)
        inside = tokens < num_tokens
        labels = tl.load(labels_ptr + tokens, mask=inside, other=0)
        valid = inside & (labels != ignore_index)
        up_to_here = seen + tl.cumsum(valid.to(tl.int32), 0)
        rows = tl.where(valid, up_to_here - 1, num_valid + tokens - up_to_here)
        rows = tl.where(num_rows == num_tokens, tokens, rows)
        kept = inside & (rows < num_rows)
        tl.store(index_ptr + rows, tokens.to(tl.int64), mask=kept)
        tl.store(kept_labels_ptr + rows, labels.to(tl.int64), mask=kept)
        if HAS_TOKEN_WEIGHT:
            weight = tl.load(token_weight_ptr + tokens, mask=kept, other=0.0)
            tl.store(kept_weight_ptr + rows, weight.to(tl.float32), mask=kept)
        seen += tl.sum(valid.to(tl.int32), 0)
        start += TILE

    normalizer = tl.load(normalizer_ptr)
    inverse = 1.0 / tl.where(normalizer == 0.0, 1.0, normalizer)
    tl.store(inverse_ptr, tl.where(normalizer == 0.0, 0.0, inverse).to(tl.float32))
    tl.store(nonzero_ptr, (normalizer != 0.0).to(tl.float32))
    is_usable = (normalizer >= 0.0) & (normalizer < float("inf"))
    tl.store(holds_ptr, (is_usable & (num_valid == num_rows) & (tl.sum(bad, 0) == 0)).to(tl.float32))


@triton.jit
def row_kernel(
    logits_ptr,
    grad_ptr,
    labels_ptr,
    token_weight_ptr,
    factor_ptr,
    nll_ptr,
    objective_ptr,
    logits_stride,
    grad_stride,
    ignore_index,
    logit_scale,
    softcap,
    VOCAB_SIZE: tl.constexpr,
    HAS_TOKEN_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BY_PROBABILITY: tl.constexpr,
    TRAINING: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss of row program_id(0) and, when TRAINING, the gradient of its raw logits.

    Equations: `reference.py` (loss) and `chunked.py` (gradient).

    logits [C, V] raw, row stride `logits_stride`; grad [C, V] the same memory, seen as the dtype of
    the next matrix products, row stride `grad_stride` in its own elements; labels int64 [C];
    token_weight fp32 [C]; factor fp32 [], multiplied into the gradient (1 / normalizer, or 1);
    nll, objective fp32 [C].

    Where logits are fp32 and the gradient is 16-bit, element v of the gradient lies on element v / 2
    of the logits: tile t is written onto tile t / 2, which has been read by then. Only the threads
    of one program share a row, so a barrier between reading and writing a tile suffices.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    label = tl.load(labels_ptr + row)

    if label == ignore_index:  # only when the caller gave more rows than have a target
        tl.store(nll_ptr + row, 0.0)
        tl.store(objective_ptr + row, 0.0)
        if TRAINING:
            for start in range(0, VOCAB_SIZE, TILE):
                cols = start + tl.arange(0, TILE)
                zero = tl.zeros([TILE], grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + cols, zero, mask=cols < VOCAB_SIZE)
        return

    # 1. The target, before anything is overwritten. A label that is no class gives a NaN loss.
    is_class = (label >= 0) & (label < VOCAB_SIZE)
    raw_target = tl.load(logits_ptr + label, mask=is_class, other=float("nan")).to(tl.float32) * logit_scale
    target = _capped(raw_target, softcap) if HAS_SOFTCAP else raw_target

    # 2. Online softmax, each lane for itself: its largest logit, and its sum of exp(z - largest), rescaled
    # as that grows. Lanes meet once, after the row. Only the last tile may be ragged: a mask in the others
    # would make their loads scalar.
    tops = tl.full([LANES], -float("inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    cols = tl.arange(0, TILE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, VOCAB_SIZE // TILE * TILE, TILE):
        z = tl.load(logits_ptr + start + cols).to(tl.float32) * logit_scale
        if HAS_SOFTCAP:
            z = _capped(z, softcap)
        tops, sums = _grown(tops, sums, z)
    if VOCAB_SIZE % TILE:
        last = VOCAB_SIZE // TILE * TILE + cols
        z = tl.load(logits_ptr + last, mask=last < VOCAB_SIZE, other=0.0).to(tl.float32) * logit_scale
        if HAS_SOFTCAP:
            z = _capped(z, softcap)
        tops, sums = _grown(tops, sums, tl.where(last < VOCAB_SIZE, z, -float("inf")))
    top = tl.max(tops, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    exp_sum = tl.sum(sums * tl.exp(tops - shift), 0)

    # 3. The loss. Not log(sum of all exp(z)) - target: at logits of 1e4 that has lost all but three digits.
    nll = tl.log(exp_sum) + (top - target)
    token_weight = 1.0
    if HAS_TOKEN_WEIGHT:
        token_weight = tl.load(token_weight_ptr + row)
    if BY_PROBABILITY:
        token_weight *= tl.exp(-nll)
    tl.store(nll_ptr + row, nll)
    tl.store(objective_ptr + row, token_weight * nll)

    # 4. The gradient, in fp32 up to its rounding, so that p - 1 of a confident target survives.
    if TRAINING:
        factor = token_weight * logit_scale * tl.load(factor_ptr)
        of_probability = factor / exp_sum
        for start in range(0, VOCAB_SIZE // TILE * TILE, TILE):
            z = tl.load(logits_ptr + start + cols).to(tl.float32) * logit_scale
            grad = _probability(z, top, of_probability, softcap, HAS_SOFTCAP)
            tl.debug_barrier()  # all threads have read the tile, and all tiles below it
            tl.store(grad_ptr + start + cols, grad.to(grad_ptr.dtype.element_ty))
        if VOCAB_SIZE % TILE:
            last = VOCAB_SIZE // TILE * TILE + cols
            z = tl.load(logits_ptr + last, mask=last < VOCAB_SIZE, other=0.0).to(tl.float32) * logit_scale
            grad = _probability(z, top, of_probability, softcap, HAS_SOFTCAP)
            tl.debug_barrier()
            tl.store(grad_ptr + last, grad.to(grad_ptr.dtype.element_ty), mask=last < VOCAB_SIZE)
        grad = tl.exp(target - top) * of_probability - factor
        if HAS_SOFTCAP:
            grad *= _capped_slope(raw_target, softcap)
        tl.debug_barrier()  # the tile with the target's probability has been written
        tl.store(grad_ptr + label, grad.to(grad_ptr.dtype.element_ty), mask=is_class)


@triton.jit
def _grown(tops, sums, z):
    """Each lane's largest logit and sum of exp(z - largest), with a tile [TILE / LANES, LANES] more."""
    new_tops = tl.maximum(tops, tl.max(z, 0))
    shifts = tl.where(new_tops == -float("inf"), 0.0, new_tops)  # -inf - -inf would be NaN
    return new_tops, sums * tl.exp(tops - shifts) + tl.sum(tl.exp(z - shifts[None, :]), 0)


@triton.jit
def _probability(z, top, of_probability, softcap, HAS_SOFTCAP: tl.constexpr):
    """The gradient of raw logits that are not the target."""
    if HAS_SOFTCAP:
        return tl.exp(_capped(z, softcap) - top) * of_probability * _capped_slope(z, softcap)
    return tl.exp(z - top) * of_probability


@triton.jit
def _capped(z, softcap):
    """softcap * tanh(z / softcap), with the absolute error of fp32."""
    e = tl.exp(-2.0 * tl.abs(z / softcap))
    tanh = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0, -softcap * tanh, softcap * tanh)


@triton.jit
def _capped_slope(z, softcap):
    """The derivative of `_capped`, 1 - tanh^2 without its cancellation."""
    e = tl.exp(-2.0 * tl.abs(z / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def segment_kernel(
    values_ptr,
    labels_ptr,
    ids_ptr,
    sums_ptr,
    counts_ptr,
    squares_ptr,
    num_tokens,
    ignore_index,
    TILE: tl.constexpr,
):
    """Sum, number and sum of squares of the values of segment program_id(0).

    values fp32 [N]; labels and ids int32 or int64 [N]; sums and squares fp64 [S], counts int64 [S].
    The values of other segments are not even loaded: their NaN cannot spread.
    """
    segment = tl.program_id(0)
    total = tl.zeros([TILE], tl.float64)
    squares = tl.zeros([TILE], tl.float64)
    count = tl.zeros([TILE], tl.int64)
    start = 0
    while start < num_tokens:
        tokens = start + tl.arange(0, TILE)
        inside = tokens < num_tokens
        ids = tl.load(ids_ptr + tokens, mask=inside, other=-1)
        labels = tl.load(labels_ptr + tokens, mask=inside, other=0)
        mine = inside & (ids == segment) & (labels != ignore_index)
        value = tl.load(values_ptr + tokens, mask=mine, other=0.0).to(tl.float64)
        total += value
        squares += value * value
        count += mine.to(tl.int64)
        start += TILE
    tl.store(sums_ptr + segment, tl.sum(total, 0))
    tl.store(squares_ptr + segment, tl.sum(squares, 0))
    tl.store(counts_ptr + segment, tl.sum(count, 0))


@triton.jit
def scale_kernel(
    gradient_ptr,
    out_ptr,
    upstream_ptr,
    pending_ptr,
    num_elements,
    IN_PLACE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = gradient * upstream * pending, and exactly 0 where pending is 0 (also beside NaN).

    gradient, out [num_elements]; upstream, pending fp32 []. A fixed number of programs shares the
    tiles, so that the usual case in place, a factor of 1, costs a launch and nothing else.
    """
    pending = tl.load(pending_ptr)
    factor = tl.load(upstream_ptr) * pending
    if IN_PLACE:  # noqa: SIM102 (decided by the compiler, the next by the GPU)
        if (factor == 1.0) & (pending != 0.0):
            return
    start = tl.program_id(0).to(tl.int64) * TILE
    while start < num_elements:
        at = start + tl.arange(0, TILE)
        inside = at < num_elements
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.where(pending == 0.0, 0.0, gradient * factor)
        tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=inside)
        start += tl.num_programs(0).to(tl.int64) * TILE
