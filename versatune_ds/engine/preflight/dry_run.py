"""A dry run of the first step: too little memory is found before minutes are lost, with what to lower.

Forward and backward run on the worst pack there can be: full, one sample (attention), every token supervised
(loss), and compared with the base model where that is asked for. Two
micro-batches where a step has several, since gradients of the first are kept meanwhile. Then
everything is forgotten, as a skipped step is: parameters, optimizer and random generators are as before, and
the run is bit for bit the run without it.

What is not covered: memory that only the optimizer step takes, evaluation and checkpoints, and fragmentation
after hours of other pack lengths.
"""

from __future__ import annotations

import numpy as np
import torch

from versatune_ds.config.schema import Config
from versatune_ds.data.collate import Batch, collate, compare, rows_of
from versatune_ds.data.plan.packing import Pack
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.faults.device_errors import out_of_memory
from versatune_ds.engine.model.isolation import LabelledSamples
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.engine.phases import phase
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.throughput import peak_memory_gib

log = get_logger(__name__)


def dry_run_when_asked(backend: Backend, config: Config) -> None:
    """`dry_run` if `train.rehearse` says so."""
    is_wanted = {"on": True, "off": False, "auto": backend.device.type == "cuda"}[config.train.rehearse]
    if is_wanted:
        with phase("rehearsal", is_limited=False):
            dry_run(backend, config)


def dry_run(backend: Backend, config: Config) -> None:
    """Run forward and backward of a step's worst packs and forget them; all ranks together.

    Raises:
        ConfigError: out of memory. A rank that fails alone tells the others (`engine/faults/heartbeat.py`).
    """
    part = backend.ranks.sp
    batch = worst_batch(rows_of(config.batch.pack_len, part.size)).part(*part).to(backend.device)
    passes = min(2, config.batch.packs_per_step // backend.ranks.dp.size)
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if backend.device.type == "cuda" else None
    try:
        for i in range(passes):
            out = backend.forward(**model_inputs(batch, float(passes * config.batch.pack_len)))
            backend.backward(out.loss, is_last=i == passes - 1)
    except torch.OutOfMemoryError as error:
        raise ConfigError(out_of_memory(config, "the rehearsal of one full pack", str(error))) from error
    backend.discard()
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state)
    log.info("rehearsal: a full pack fits; peak %.2f GiB", peak_memory_gib())


def worst_batch(pack_len: int) -> Batch:
    """One sample that fills the pack, all of it supervised."""
    pack = Pack(np.zeros(1, np.int32), np.zeros(1, np.int64), np.full(1, pack_len, np.int32))
    sources = [LabelledSamples([np.zeros(pack_len, np.uint32)])]
    whole = collate(pack, sources, pack_len, 0)
    return compare(whole, pack, np.ones(1, bool), sources, 0, pack_len)
