"""A rehearsal of the first step: too little memory is found before minutes are lost, with what to lower.

Forward and backward run on the worst pack there can be: full, one sample (attention), every token supervised
(loss). Two micro-batches where a step has several, since gradients of the first are kept meanwhile. Then
everything is forgotten, as a skipped step is: parameters, optimizer and random generators are as before, and
the run is bit for bit the run without it.

What is not covered: memory that only the optimizer step takes, evaluation and checkpoints, and fragmentation
after hours of other pack lengths.
"""

from __future__ import annotations

import numpy as np
import torch

from versatune_ds.config.schema import Config
from versatune_ds.data.collate import Batch, collate
from versatune_ds.data.packing import Pack
from versatune_ds.engine.build import Engine, discard_step
from versatune_ds.engine.device_errors import out_of_memory
from versatune_ds.engine.evaluate import model_inputs
from versatune_ds.engine.liveness import mark
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.throughput import peak_memory_gib

log = get_logger(__name__)


def rehearse_when_asked(engine: Engine, config: Config) -> None:
    """`rehearse` if `train.rehearse` says so."""
    is_wanted = {"on": True, "off": False, "auto": engine.device.type == "cuda"}[config.train.rehearse]
    if is_wanted:
        mark("rehearsal", is_limited=False)
        rehearse(engine, config)


def rehearse(engine: Engine, config: Config) -> None:
    """Run forward and backward of a step's worst packs and forget them; all ranks together.

    Raises:
        ConfigError: out of memory. A rank that fails alone tells the others (`engine/heartbeat.py`).
    """
    batch = worst_batch(config.batch.pack_len).to(engine.device)
    passes = min(2, config.batch.packs_per_step // distributed.world_size())
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if engine.device.type == "cuda" else None
    try:
        for i in range(passes):
            engine.deepspeed.set_gradient_accumulation_boundary(i == passes - 1)
            out = engine.deepspeed(**model_inputs(batch, float(passes * batch.supervised_tokens)))
            engine.deepspeed.backward(out.loss.clone(), scale_wrt_gas=False)
    except torch.OutOfMemoryError as error:
        raise ConfigError(out_of_memory(config, "the rehearsal of one full pack", str(error))) from error
    discard_step(engine)
    torch.set_rng_state(cpu_state)
    if cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state)
    log.info("rehearsal: a full pack fits; peak %.2f GiB", peak_memory_gib())


def worst_batch(pack_len: int) -> Batch:
    """One sample that fills the pack, all of it supervised."""
    pack = Pack(np.zeros(1, np.int32), np.zeros(1, np.int64), np.full(1, pack_len, np.int32))
    return collate(pack, [_FullSample(pack_len)], pack_len, 0)


class _FullSample:
    """A token source whose only sample fills a pack."""

    def __init__(self, pack_len: int) -> None:
        self.pack_len = pack_len

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.pack_len, np.uint32), np.ones(self.pack_len, bool)
