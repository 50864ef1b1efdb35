"""Loading a checkpoint on another number of ranks or in another ZeRO stage.

DeepSpeed's shards are flat: every rank's file holds its part of every parameter, of both moments and of the
fp32 master weights, end to end. `SavedShards` maps the files of all saved ranks into memory and knows for
each parameter which file holds which of its elements. A rank of the new run then copies the elements that
it owns, and no others: nothing is converted, no second copy lies on the disk, no rank waits for another, and
the host memory in use is the largest parameter's part.

DeepSpeed has its own way, universal checkpoints: one process first rewrites the whole checkpoint. Read in
DeepSpeed 0.19.8, its ZeRO-3 loader gives the weight decay of the first parameter group to all groups and one
step tensor to all of them (AdamW then counts once per group and step), every rank reads all of another rank's
shard and every parameter whole, and a checkpoint cannot change between stage 3 and the others.

What is not covered: stage 0 (its optimizer state is not sharded, DeepSpeed loads it on any number of ranks),
other dtypes, moments swapped to NVMe, and model parallelism.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from versatune_ds.engine.build import Engine
from versatune_ds.engine.safe_loading import tensors_only
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32"


class Span(NamedTuple):
    """Elements `start` .. `start + numel` of a flattened parameter, and where they are saved."""

    start: int
    numel: int
    rank: int
    """Saved rank, whose file it is."""
    group: int
    """Flat group within the file."""
    offset: int
    """First element within the flat group."""


Spans = dict[str, list[Span]]


def spans_of_stage3(shapes: Sequence[Mapping[str, Sequence[int]]], world_size: int) -> Spans:
    """Where ZeRO-3 keeps each parameter: every rank has an equal part of it, the last ones padded.

    Args:
        shapes: of each flat group, name -> shape in the order of the flat group.
        world_size: saved ranks.
    """
    spans: Spans = {}
    for group, members in enumerate(shapes):
        offset = 0
        for name, shape in members.items():
            numel = math.prod(shape)
            part = math.ceil(numel / world_size)
            spans[name] = [
                Span(rank * part, min(part, numel - rank * part), rank, group, offset)
                for rank in range(world_size)
                if rank * part < numel
            ]
            offset += part
    return spans


def spans_of_stages_1_and_2(mappings: Sequence[Sequence[Mapping[str, Any]]]) -> Spans:
    """Where ZeRO-1 and ZeRO-2 keep each parameter: the flat groups are cut into equal parts, one a rank.

    Args:
        mappings: of each rank and flat group, name -> (start, numel) within that rank's part.
    """
    spans: Spans = {}
    for rank, groups in enumerate(mappings):
        for group, members in enumerate(groups):
            for name, address in members.items():
                found = spans.setdefault(name, [])
                start = found[-1].start + found[-1].numel if found else 0
                found.append(Span(start, address.numel, rank, group, address.start))
    return spans


def cut(spans: Sequence[Span], start: int, stop: int) -> Iterable[Span]:
    """The parts of `spans` (in order, without gaps) that cover elements `start` .. `stop`."""
    first = max(0, bisect_right([span.start for span in spans], start) - 1)
    for span in spans[first:]:
        low, high = max(start, span.start), min(stop, span.start + span.numel)
        if low < high:
            yield span._replace(start=low, numel=high - low, offset=span.offset + low - span.start)


class SavedShards:
    """The optimizer shards of a ZeRO checkpoint, read element by element.

    Args:
        folder: a sound checkpoint of stage 1, 2 or 3.
        world_size: ranks that wrote it.

    Raises:
        StateError: files that DeepSpeed's ZeRO optimizers did not write.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        files = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank_in_name)
        if [_rank_in_name(path) for path in files] != list(range(world_size)):
            raise StateError(
                f"{folder}: optimizer shards of ranks {[_rank_in_name(path) for path in files]} "
                f"found, 0 to {world_size - 1} expected; restore the missing files"
            )
        shards = [_mapped(path)["optimizer_state_dict"] for path in files]
        self._master: list[list[torch.Tensor]]
        if "fp32_flat_groups" in shards[0]:
            self.counters = _mapped(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
            self._master = [shard["fp32_flat_groups"] for shard in shards]
            states = [shard["optimizer_state_dict"]["state"] for shard in shards]
            self.spans = spans_of_stage3(self.counters["param_shapes"], world_size)
        elif "single_partition_of_fp32_groups" in shards[0]:
            self.counters = _mapped(folder / "mp_rank_00_model_states.pt")
            self._master = [shard["single_partition_of_fp32_groups"] for shard in shards]
            states = [shard["base_optimizer_state"]["state"] for shard in shards]
            self.spans = spans_of_stages_1_and_2([shard["param_slice_mappings"] for shard in shards])
        else:
            raise StateError(
                f"{folder} holds optimizer shards in a layout that cannot be divided anew (gradient "
                "accumulation in another dtype?); resume it with the ranks and settings it was saved with"
            )
        self._moments: list[Any] = states
        self.steps = int(states[0][0]["step"])
        """Optimizer steps that AdamW has counted."""
        self.loss_scaling = {
            name: shards[0][name] for name in ("loss_scaler", "dynamic_loss_scale", "overflow")
        }

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` .. `stop` of a flattened parameter's fp32 weights or moment, fp32 on the CPU.

        Args:
            kind: `MASTER` or one of `MOMENTS`.

        Raises:
            StateError: the checkpoint does not hold them.
        """
        pieces = []
        for span in cut(self.spans.get(name, []), start, stop):
            if kind == MASTER:
                flat = self._master[span.rank][span.group]
            else:
                flat = self._moments[span.rank][span.group][kind]
            pieces.append(flat.narrow(0, span.offset, span.numel))
        found = sum(piece.numel() for piece in pieces)
        if found != stop - start:
            raise StateError(
                f"{self.folder}: parameter {name} has {found} of the {stop - start} elements needed; was it "
                "written by another model?"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)


def load_resharded(folder: Path, world_size: int, engine: Engine) -> None:
    """Load model and optimizer from a checkpoint of `world_size` ranks, any ZeRO stage from 1 to 3.

    Every rank calls it and reads what it owns. Hyperparameters stay those of the running configuration.
    """
    live = engine.deepspeed
    if live.zero_nvme_offload_optimizer():
        raise StateError(
            f"{folder} was written with other ranks or settings, and moments on NVMe cannot be divided anew; "
            "resume it as it was saved"
        )
    saved = SavedShards(folder, world_size)
    optimizer = live.optimizer
    partitioned = live.zero_optimization_partition_weights()
    stage_3, others = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
    flats = getattr(optimizer, stage_3 if partitioned else others)
    for flat in flats:
        optimizer.optimizer.state[flat] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
    if partitioned:
        optimizer.checkpoint_event_prologue()
        for parameter, name in live.param_names.items():
            _load_stage3(saved, name, parameter)
    else:
        for flat, group in zip(flats, optimizer.bit16_groups, strict=True):
            for parameter in group:
                _load_stages_1_and_2(saved, live.param_names[parameter], parameter, flat, optimizer)
        optimizer.update_lp_params()
    for flat, state in optimizer.optimizer.state.items():
        state["step"] = _step_count(saved.steps, flat, optimizer.optimizer)
    for key, value in saved.loss_scaling.items():
        setattr(optimizer, key, value)
    if partitioned:
        optimizer.checkpoint_event_epilogue()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(live, key, saved.counters[key])


def _load_stage3(saved: SavedShards, name: str, parameter: Any) -> None:
    """Fill this rank's part of a parameter that ZeRO-3 has partitioned; the last ranks' parts are padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    part = parameter.ds_tensor.numel()
    start = min(distributed.rank() * part, parameter.ds_numel)
    stop = min(start + part, parameter.ds_numel)

    def read(kind: str) -> torch.Tensor:
        return torch.nn.functional.pad(saved.read(name, kind, start, stop), (0, part - (stop - start)))

    weights = read(MASTER)
    safe_set_local_fp32_param(parameter, weights)
    parameter.ds_tensor.data.copy_(weights)
    for kind in MOMENTS:
        safe_set_local_optimizer_state(parameter, read(kind), kind)


def _load_stages_1_and_2(
    saved: SavedShards, name: str, parameter: Any, flat: torch.Tensor, optimizer: Any
) -> None:
    """Fill the elements of a parameter that lie in this rank's part of its flat group, if any do."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    at = mapping.hp_fragment_address.start
    flat.data.narrow(0, at, numel).copy_(saved.read(name, MASTER, start, start + numel))
    for kind in MOMENTS:
        moment = optimizer.optimizer.state[flat][kind]
        moment.narrow(0, at, numel).copy_(saved.read(name, kind, start, start + numel))


def _step_count(steps: int, flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """AdamW's counter as the optimizer wants it: torch's a tensor of its own, DeepSpeed's a number."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.tensor(float(steps), device=flat.device if on_device else "cpu")


def _rank_in_name(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])


def _mapped(path: Path) -> Any:
    """A DeepSpeed file without its bytes: tensors are read when they are copied from. No code is run."""
    with tensors_only(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
