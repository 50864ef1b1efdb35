"""Sizes of DeepSpeed's buffers by the size of the model, where the user's file gives none.

A gradient is sent once its bucket is full. A bucket larger than the model is full when backward is over, and
then nothing is left to hide the sending behind; so a bucket is one layer: while one is sent, the layer before
it computes. The same holds for weights that ZeRO-3 fetches ahead. Beside a frozen model only its adapter has
gradients, so their bucket is a layer's adapter, while weights are fetched by whole layers as ever: with LoRA
of rank 16 beside a 32B model a bucket of 200 M elements would not be full before backward is over (the
adapter has 134 M), and DeepSpeed allocates all of it. Below `SMALLEST` messages cost more than they hide,
above `LARGEST` buffers cost memory and hide nothing more. ZeRO-3's optimizer works on one group of
`SUB_GROUP` elements at a time, whose gradient it holds in fp32: 0.8 GB, not DeepSpeed's 4 GB. A smaller
adapter is one group of its size.

DeepSpeed 0.19.8 overlaps by itself at stage 3 only. At stages 1 and 2 it then fills two buckets in turn; the
wrong gradients that were reported of that are mended in it (DeepSpeed pull requests 7965 and 8080). 20 steps
with and without it are compared in `tests/engine/test_step.py`.

What is not covered: speed on GPUs, where none of these numbers has been measured.
"""

from __future__ import annotations

from typing import Any

from versatune_ds.config.model import Adapter
from versatune_ds.engine.model.shape import ModelShape

SMALLEST, LARGEST = 5_000_000, 200_000_000
SUB_GROUP = 200_000_000
DEEPSPEED_SUB_GROUP = 1_000_000_000
"""DeepSpeed's own, which checkpoints had before it was chosen here."""
SUB_GROUP_KEY = "ZeRO-3 sub_group_size"
"""Of a checkpoint's layout: another size divides its state otherwise."""


def with_sizes(zero: dict[str, Any], shape: ModelShape, adapter: Adapter | None) -> dict[str, Any]:
    """A `zero_optimization` section with `overlap_comm` and sizes, in elements, that it does not give.

    Args:
        zero: the section; what it gives stays.
        adapter: what is trained of the model; None: all of it.
    """
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return zero
    layer, trained = (
        min(max(size, SMALLEST), LARGEST)
        for size in (shape.layer_parameters, _trained_in_a_layer(shape, adapter))
    )
    sizes: dict[str, Any] = {"overlap_comm": True, "reduce_bucket_size": trained}
    if stage == 3:
        sizes |= {"stage3_prefetch_bucket_size": layer, "sub_group_size": SUB_GROUP}
    return {**sizes, **zero}


def _trained_in_a_layer(shape: ModelShape, adapter: Adapter | None) -> int:
    """Elements; kinds of linear layers that the shape does not know count nothing."""
    if adapter is None:
        return shape.layer_parameters
    names = shape.linears if adapter.targets == "all-linear" else adapter.targets
    known = [shape.linears[name] for name in names if name in shape.linears]
    return adapter.rank * sum(linear.width + linear.out for linear in known)


def describe_sizes(zero: dict[str, Any]) -> str:
    """Of a section in force, for the log."""
    names = {
        "reduce_bucket_size": "gradients",
        "stage3_prefetch_bucket_size": "weights ahead",
        "sub_group_size": "optimizer group",
    }
    sizes = [f"{what} {zero[key] / 1e6:.4g} M" for key, what in names.items() if key in zero]
    overlap = "on" if zero.get("overlap_comm") else "off"
    return f"overlap of communication {overlap}; elements: {', '.join(sizes)}"
