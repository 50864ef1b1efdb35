"""What a run holds in memory, in bytes, from its shape and settings. Nothing is built.

Lists for one GPU: what is always held, what forward and backward add, what the optimizer step adds. The last
two never stand together, so the peak is the first plus the larger of them. N parameters, w ranks, s bytes an
element of `model.dtype`:

    always     parameters s N (ZeRO-3: / w), master weights 4 N / w, two moments 8 N / w
    both       gradients s N (ZeRO-2 and 3: / w)
    forward    tensors kept for backward (`layer_activations`), gathered weights of ZeRO-3, the loss
    step       gradients of the partition in the dtype of its master weights

Of a pack that ranks share (`batch.sequence_parallel`) each holds its own rows. With an adapter N is that of
the adapter. The frozen model beside it has s bytes a parameter (qlora: its layers' matrices half a byte and a
bit), keeps nothing that only a weight's gradient needs, and its head gets none. The adapter keeps its inputs
and their products with A. `model.kl_to_base` is planned for a pack all of which is compared; the base's own
forward comes before the model's, when there is room.

Buffers follow DeepSpeed 0.19.8. `Part.checked` tells what `tests/apps/test_plan_memory.py` compares with
real small runs on CPUs, allocation by allocation; the rest is marked as a model.

What is not covered: CUDA's allocator beyond a margin, liger-kernel and torch.compile (both lower the
activations), NVMe offload. ZeRO++'s secondary partition is an estimate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from versatune_ds.apps.plan.setup import FP32, GIB, INT, LONG, Checkpointing, Setup, ZeroBuffers
from versatune_ds.config.model import Adapter
from versatune_ds.domain.statistics import NUM_ROWS
from versatune_ds.engine.backend.rounded_adamw import SLICE
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.engine.model.source import DTYPES
from versatune_kernels.chunked import VOCAB_BLOCK
from versatune_kernels.contract import Spec
from versatune_kernels.divergence import kl_chunk_tokens
from versatune_kernels.sizing import auto_chunk_tokens, row_stride, triton_chunks

NF4 = 0.5 + 0.127 / 8
"""Bytes of a weight in 4 bits with its doubly quantised scales (arXiv 2305.14314, section 3)."""

# Model, not measured: what CUDA, cuBLAS and NCCL take for themselves, and what the allocator loses to holes.
CUDA_CONTEXT_BYTES = int(1.5 * GIB)
FRAGMENTATION = 0.06
# Measured 2026-11-20 on 2 CPU cores: a rank with a tiny model holds 0.6 GiB in RAM; CUDA's libraries and
# pinned batches add to it (model).
HOST_PROCESS_BYTES = int(3.0 * GIB)


class Part(NamedTuple):
    name: str
    bytes: int
    checked: bool
    """Compared with measured memory on CPUs; else a model."""


class MemoryPlan(NamedTuple):
    """Bytes on one GPU, and in host memory per rank."""

    held: tuple[Part, ...]
    forward_backward: tuple[Part, ...]
    optimizer_step: tuple[Part, ...]
    margin: tuple[Part, ...]
    host: tuple[Part, ...]

    @property
    def tensors(self) -> int:
        return total(self.held) + max(total(self.forward_backward), total(self.optimizer_step))

    @property
    def peak(self) -> int:
        """What the GPU must have."""
        return self.tensors + total(self.margin)


def total(parts: tuple[Part, ...]) -> int:
    return sum(part.bytes for part in parts)


def memory_plan(shape: ModelShape, setup: Setup) -> MemoryPlan:
    """Memory of a run; `setup.packs_per_step` is a multiple of `gpus` over `sequence_parallel`."""
    held, gradients, step, host = _states(shape, setup)
    work = (*_activations(shape, setup), *_communication(shape, setup), *_loss(shape, setup))
    forward, step = (*gradients, *work), (*gradients, *step)
    tensors = total(held) + max(total(forward), total(step))
    margin: tuple[Part, ...] = ()
    if setup.device == "cuda":
        margin = (
            Part("CUDA context and NCCL", CUDA_CONTEXT_BYTES, False),
            Part(f"fragmentation, {FRAGMENTATION:.0%}", int(FRAGMENTATION * tensors), False),
        )
        host = (*host, Part("process, libraries, loader", HOST_PROCESS_BYTES, False))
    return MemoryPlan(held, forward, step, margin, host)


def adapter_sizes(shape: ModelShape, adapter: Adapter | None) -> list[int]:
    """Elements of an adapter's tensors: A, B and DoRA's lengths of every layer that has one."""
    if adapter is None:
        return []
    linears = shape.targets(adapter)
    sizes = [adapter.rank * width for linear in linears for width in (linear.width, linear.out)]
    return (sizes + [linear.out for linear in linears] * (adapter.kind == "dora")) * shape.layers


def trained_parameters(shape: ModelShape, adapter: Adapter | None) -> int:
    """Parameters that have gradients and an optimizer state."""
    return shape.parameters if adapter is None else sum(adapter_sizes(shape, adapter))


def layer_activations(shape: ModelShape, setup: Setup) -> int:
    """Bytes that one layer keeps for backward when nothing is recomputed.

    Per token: its norms (the input in fp32, the normalised one in `dtype`, or in fp32 where a family scales
    in it, and the scaled one in `dtype`), q, k, v and the attention output, and gate, activated gate, up and
    their product of the MLP; for experts these of each choice, with its input and its output. Beside them one
    fp32 number per norm, per expert, and per head for attention. Of a shared pack there are key-value heads
    for each rank that needs them, and attention's output before and after its exchange.

    A frozen layer lacks what only its weights' gradients need: normalised inputs, what goes into matrices.
    """
    s, is_trained, n = setup.element, setup.adapter is None, setup.sequence_parallel
    normed = FP32 + (FP32 if shape.fp32_norms else s) * is_trained
    norm = shape.hidden * (normed + s * is_trained)
    attention = 2 * (shape.query_width + math.lcm(shape.kv_heads, n) * shape.head_size) * s
    if setup.device == "cpu" or n > 1:  # outputs of the samples and of all; before and after the exchange
        attention += shape.query_width * s
    if shape.joined and n == 1:  # v is a part of what the joined matrix gave, which is kept whole
        attention += (shape.query_width + shape.kv_width) * s
    mlp = (3 + is_trained) * shape.mlp * s
    if shape.experts is not None:
        choice = ((3 + is_trained) * shape.experts.mlp + (1 + is_trained) * shape.hidden) * s
        mlp = shape.experts.active * choice + FP32 * shape.experts.count
    rest = FP32 * (shape.norms + shape.heads) + _adapter_activations(shape, setup)
    if shape.query_key_norms:
        rest += (shape.query_width + shape.kv_width) * normed + FP32 * (shape.heads + shape.kv_heads)
    return setup.rows * (shape.norms * norm + attention + mlp + rest)


def _adapter_activations(shape: ModelShape, setup: Setup) -> int:
    """Bytes a token that the adapters of a layer keep: what goes into A (once for layers that share it; with
    dropout each its own and a mask) and into B, and for the gradient of DoRA's lengths two outputs."""
    adapter, s = setup.adapter, setup.element
    if adapter is None:
        return 0
    linears = shape.targets(adapter)
    inputs = {x.source: x.width * s for x in linears if x.source != "attention"}  # which attention keeps
    kept = sum(inputs.values()) + len(linears) * adapter.rank * s
    if adapter.dropout:
        mask = s if setup.device == "cpu" else 1
        kept = sum(x.width * (s + mask) for x in linears) + len(linears) * adapter.rank * s
    return kept + sum(2 * x.out * s for x in linears) * (adapter.kind == "dora")


def kept_outputs(shape: ModelShape, setup: Setup) -> int:
    """Bytes that one layer keeps under `selective`: its input and the outputs of products and attention.

    Per token: q, k, v, the attention output (and one fp32 number per head) and its product; gate, up and
    down of the MLP, or of each choice of experts; of adapters A and B.
    """
    kv_width = math.lcm(shape.kv_heads, setup.sequence_parallel) * shape.head_size
    width = 2 * shape.hidden + 2 * (shape.query_width + kv_width)
    if shape.experts is None:
        width += 2 * shape.mlp + shape.hidden
    else:
        width += shape.experts.active * (2 * shape.experts.mlp + shape.hidden) + shape.experts.count
    if setup.adapter is not None:
        width += sum(setup.adapter.rank + linear.out for linear in shape.targets(setup.adapter))
    return setup.rows * (width * setup.element + FP32 * shape.heads)


def recomputed_layers(layers: int, policy: Checkpointing) -> int:
    """Layers whose products are recomputed: none, all, or every n-th from the first."""
    if policy in ("off", "selective"):
        return 0
    return math.ceil(layers / policy) if isinstance(policy, int) else layers


def saved_activations(shape: ModelShape, setup: Setup) -> int:
    """Bytes that the layers and the last norm keep for backward, after a whole forward."""
    s, tokens = setup.element, setup.rows
    recomputed = recomputed_layers(shape.layers, setup.checkpointing)
    is_selective = setup.checkpointing == "selective"
    kept = (shape.layers - recomputed) * (kept_outputs if is_selective else layer_activations)(shape, setup)
    inputs = 0 if setup.inputs_on_host else recomputed * tokens * shape.hidden * s
    norm = tokens * (shape.hidden * FP32 + FP32)
    last_norm = norm + tokens * shape.hidden * s if setup.adapter is None else norm
    rotary = 2 * shape.head_size * tokens * s
    # below the first adapter nothing has a gradient
    first_norm = norm if setup.adapter is not None and not recomputed and not is_selective else 0
    return kept + inputs + last_norm + rotary - first_norm


def _activations(shape: ModelShape, setup: Setup) -> tuple[Part, ...]:
    """Saved tensors, the layer in backward, and the batch."""
    tokens, s = setup.rows, setup.element
    parts = [Part("activations kept for backward", saved_activations(shape, setup), True)]
    # If layers stand behind the last recomputed one, theirs have gone before it comes back.
    policy = setup.checkpointing
    recomputes = policy != "off" and (isinstance(policy, str) or (shape.layers - 1) % policy == 0)
    # In backward: gradients of the MLP's product, its two factors and the hidden states around it. The
    # product itself, of a frozen layer, has gone by then.
    working = tokens * s * ((3 if setup.adapter is None else 2) * shape.mlp + 2 * shape.hidden)
    if recomputes:
        working += layer_activations(shape, setup)
    if setup.checkpointing == "selective":
        working -= kept_outputs(shape, setup)
    # The layer's own work stands against the loss's: they are not there at the same time.
    beyond_loss = max(0, working - total(_loss(shape, setup)))
    if beyond_loss:
        name = "one layer recomputed, and its backward" if recomputes else "backward of one layer"
        parts.append(Part(f"{name}, beyond the loss buffer", beyond_loss, False))
    batch = tokens * (3 * LONG + 2 * INT)
    parts.append(Part("batch", batch, True))
    return tuple(parts)


def _loss(shape: ModelShape, setup: Setup) -> tuple[Part, ...]:
    """Logits of a chunk and the gradients that the fused loss computes in its forward pass."""
    tokens, s, width, vocab = setup.rows, setup.element, shape.hidden, shape.vocab
    labels = max(1, round(setup.supervised * tokens))
    compared, kl_logits = _comparison(shape, setup, labels)
    is_trained = setup.adapter is None
    what = "loss: gradients of head and hidden states" if is_trained else "loss: gradient of hidden states"
    if setup.device == "cuda":
        spec = Spec(1.0, 0.0, setup.logits_dtype, chunk_tokens=0, grad_hidden=True, grad_weight=is_trained)
        rows, fp32_sum = triton_chunks(spec, labels, width, vocab, DTYPES[setup.dtype])
        gradient = FP32 if setup.dtype == "fp16" else s
        logits = min(rows, labels) * row_stride(vocab) * (FP32 if setup.logits_dtype == "fp32" else s)
        weight = vocab * width * (FP32 if fp32_sum else gradient) * is_trained
        rounded = vocab * width * gradient if fp32_sum and gradient != FP32 else 0
        hidden = tokens * width * gradient + min(rows, labels) * width * 2 * s
        chunk = max(logits, rounded)
    else:
        rows = min(auto_chunk_tokens(labels, width, vocab), labels)
        logits = rows * vocab * (FP32 + (s if s < FP32 else 0))
        block = min(vocab, VOCAB_BLOCK) * width * FP32 if s < FP32 else 0
        weight = vocab * width * (FP32 + (s if s < FP32 else 0)) * is_trained
        hidden = tokens * width * FP32 + 2 * rows * width * FP32
        chunk = logits + block
    is_checked = setup.device != "cuda"
    return (
        Part("loss: logits of a chunk", max(chunk, kl_logits), is_checked),
        Part(what, weight + hidden, is_checked),
        *compared,
    )


def _comparison(shape: ModelShape, setup: Setup, labels: int) -> tuple[tuple[Part, ...], int]:
    """What `kl_to_base` holds beside the loss, and its logits, of which a chunk's stand twice: hidden states
    of both models in their dtype, and the gradient in fp32."""
    if not setup.compares:
        return (), 0
    rows = min(kl_chunk_tokens(labels, shape.hidden, shape.vocab), labels)
    parts = [Part("KL to the base: hidden states", labels * shape.hidden * (2 * setup.element + FP32), False)]
    if setup.keeps_base:  # summed in fp32, and rounded beside that
        rounded = setup.element if setup.element < FP32 else 0
        parts.append(
            Part("KL to the base: gradient of the head", shape.head_parameters * (FP32 + rounded), False)
        )
    return tuple(parts), 2 * rows * shape.vocab * FP32


def _communication(shape: ModelShape, setup: Setup) -> tuple[Part, ...]:
    """Whole weights that ZeRO-3, or qlora's products, hold for a while; buckets of the other stages, which go
    after backward."""
    if setup.is_qlora:
        largest = max(linear.width * linear.out for linear in shape.linears.values())
        return (Part("a weight out of its 4 bits", largest * setup.element, False),)
    if setup.zero_stage == 0:
        return ()
    buffers = ZeroBuffers.of(shape, setup)
    if setup.zero_stage < 3:
        buckets = 2 if buffers.overlap else 1
        return (Part("communication buckets", buckets * buffers.reduce_bucket * setup.element, True),)
    largest = max(shape.head_parameters, shape.layer_parameters)
    live = min(shape.parameters, max(buffers.max_live, largest + buffers.prefetch_bucket))
    return (Part("gathered parameters (ZeRO-3)", live * setup.element, True),)


def frozen_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of a whole model that an adapter, or a trained copy, stands beside."""
    in_4_bits = shape.layers * sum(x.width * x.out for x in shape.linears.values()) if setup.is_qlora else 0
    return int((shape.parameters - in_4_bits) * setup.element + in_4_bits * NF4)


def moment_bytes(shape: ModelShape, setup: Setup, shards: int) -> int:
    """Of one shard: two moments of AdamW; for Muon's matrices one momentum, in the gradients' dtype."""
    vectors = sum(shape.vectors) * shape.layers + shape.hidden
    by_muon = shape.nonembedding_parameters - vectors if setup.has_muon else 0
    both = 2 * setup.moment
    n = trained_parameters(shape, setup.adapter)
    return math.ceil((n * both - by_muon * (both - setup.element)) / shards)


def _states(
    shape: ModelShape, setup: Setup
) -> tuple[tuple[Part, ...], tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """(always held on the GPU, gradients of a step, added by the optimizer step, held in host memory)."""
    s, stage, buffers = setup.element, setup.zero_stage, ZeroBuffers.of(shape, setup)
    adapter = adapter_sizes(shape, setup.adapter)
    n, largest = trained_parameters(shape, setup.adapter), max(adapter, default=shape.head_parameters)
    shard = math.ceil(n / setup.shards)
    held: list[Part] = []
    host: list[Part] = []
    parameters = [Part("parameters", (shard if stage == 3 else n) * s, True)]
    if setup.adapter is not None or setup.keeps_base:
        frozen = frozen_bytes(shape, setup) // (setup.shards if stage == 3 else 1)
        parameters.insert(0, Part("frozen model", frozen, not setup.is_qlora))
    (host if setup.offload == "all" and stage == 3 else held).extend(parameters)
    if stage == 3:
        vectors = (*shape.vectors * shape.layers, shape.hidden, *adapter)
        small = [size for size in vectors if size < buffers.persistence_threshold]
        held.append(Part("parameters kept whole (small ones)", sum(small) * s, True))
        if buffers.hpz_ranks > 1:
            whole = shape.parameters * s
            held.append(Part("parameters, secondary copy (ZeRO++)", whole // buffers.hpz_ranks, False))
    if setup.has_average:
        # of weights on the host none is copied
        copies = 0 if setup.offloads_optimizer or setup.device == "cpu" else 1
        host.append(Part("average of the weights, and a copy of them", shard * (1 + copies) * FP32, True))
    states = [Part("moments", moment_bytes(shape, setup, setup.shards), True)]
    if stage:
        states.insert(0, Part("master weights", shard * setup.master, True))
    (host if setup.offloads_optimizer else held).extend(states)
    if stage in (1, 2):
        held.append(Part("gradient of the largest weight, still referenced", largest * s, True))
    gradients = Part("gradients", (shard if stage >= 2 else n) * s, True)
    step: list[Part] = []
    of_step: list[Part] = []
    if setup.offloads_optimizer:
        packs = setup.packs_per_step * setup.sequence_parallel // setup.gpus
        accumulated = shard * s if stage == 3 or packs > 1 else 0  # gradients outlive a micro-batch
        rounded = shard * s if stage < 3 else 0
        host.append(Part("gradients", shard * FP32 + accumulated + rounded, True))
        if stage < 3:
            held.append(Part("staging of gradients", 2 * largest * s, True))
    elif stage == 3:
        held.append(gradients)  # one flat buffer for the whole run
    else:
        of_step.append(gradients)
    if stage == 3:
        held.append(Part("communication bucket", buffers.reduce_bucket * s, True))
    if setup.inputs_on_host:
        host.append(Part("inputs of layers", shape.layers * setup.rows * shape.hidden * s, False))
    held.append(Part("statistics", NUM_ROWS * 8 * 64, True))
    if stage and not setup.offloads_optimizer:
        one_group = min(shard, buffers.sub_group) if stage == 3 else shard
        step.append(Part("gradients of the partition, as master weights", one_group * setup.master, True))
        if setup.states != "fp32":
            step.append(Part("temporaries of AdamW", min(one_group, SLICE) * 6 * FP32, True))
    return tuple(held), tuple(of_step), tuple(step), tuple(host)
