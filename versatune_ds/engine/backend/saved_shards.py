"""Reading the files of a checkpoint of any ZeRO stage, an element range or a parameter at a time.

Under ZeRO-1 to 3 DeepSpeed's shards are flat: every rank's file holds its part of every parameter, of both
moments and of the fp32 master weights, end to end. `SavedShards` maps the files of all saved ranks into
memory and knows for each parameter which file holds which of its elements. Stage 0 shards nothing: its model
file holds the fp32 weights themselves. `SavedWeights` is the model of either kind by its parameters' names.

Files are mapped and never run code (`engine/backend/safe_loading.py`); host memory holds what was asked for,
and the pages that were read count as cache, which the system takes back when it needs them.

DeepSpeed's own reader, `zero_to_fp32` (0.19.8), makes a whole fp32 copy of a model of stage 1 or 2 beside the
whole 16-bit model, and ends with a TypeError at stage 0.

What is not covered: weights swapped to NVMe (the files do not hold them), parameters divided among some of
the ranks only (MiCS); both are refused. Model parallelism.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from versatune_ds.engine.backend.safe_loading import tensors_only
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


def spans_of_stages_1_and_2(
    shapes: Sequence[Mapping[str, Sequence[int]]],
    sizes: Sequence[Sequence[int]],
    paddings: Sequence[Sequence[int]],
) -> Spans:
    """Where ZeRO-1 and ZeRO-2 keep each parameter: the flat groups are cut without regard to parameters.

    (`param_slice_mappings` in the shards says so too, but not with `round_robin_gradients`: DeepSpeed 0.19.8
    then lays parameters out in another order than it notes there.)

    Args:
        shapes: of each flat group, name -> shape in the order of the flat group.
        sizes: of each rank and flat group, elements in that rank's file.
        paddings: of each flat group, elements after each parameter that belong to none.
    """
    spans: Spans = {}
    for group, members in enumerate(shapes):
        parts = list(accumulate((rank_sizes[group] for rank_sizes in sizes), initial=0))
        at = 0
        for (name, shape), padding in zip(members.items(), paddings[group], strict=True):
            end = at + math.prod(shape)
            cuts = [(max(at, low), min(end, high)) for low, high in pairwise(parts)]
            spans[name] = [
                Span(first - at, last - first, rank, group, first - parts[rank])
                for rank, (first, last) in enumerate(cuts)
                if first < last
            ]
            at = end + padding
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

    Raises:
        StateError: files that DeepSpeed's ZeRO optimizers did not write, or that do not hold the weights.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        with _known_layout(folder):
            files = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank_in_name)
        if [_rank_in_name(path) for path in files] != list(range(world_size)):
            raise StateError(
                f"{folder}: optimizer shards of ranks {[_rank_in_name(path) for path in files]} "
                f"found, 0 to {world_size - 1} expected; restore the missing files"
            )
        with _known_layout(folder):
            shards = [mapped(path)["optimizer_state_dict"] for path in files]
            self.is_partitioned = "fp32_flat_groups" in shards[0]
            """True under stage 3: the model's own parameters are sharded, too."""
            self.model_state = mapped(folder / model_file(0 if self.is_partitioned else None))
            """Rank 0's model file: names, shapes, buffers, counters."""
            master = "fp32_flat_groups" if self.is_partitioned else "single_partition_of_fp32_groups"
            optimizer = "optimizer_state_dict" if self.is_partitioned else "base_optimizer_state"
            self._master: list[list[torch.Tensor]] = [shard[master] for shard in shards]
            self._optimizers = [shard[optimizer] for shard in shards]
            self._first = shards[0]
            shapes = self.model_state["param_shapes"]
            sizes = [[flat.numel() for flat in flats] for flats in self._master]
            if self.is_partitioned:
                self.spans = spans_of_stage3(shapes, world_size)
                self._check_sizes(shapes, sizes)
            else:
                none = [[0] * len(members) for members in shapes]  # as with fp32 gradient accumulation
                paddings = self._first.get("param_alignment_paddings", none)
                self.spans = spans_of_stages_1_and_2(shapes, sizes, paddings)

    @property
    def steps(self) -> int:
        """Optimizer steps that AdamW has counted."""
        return int(self._optimizers[0]["state"][0]["step"])

    @property
    def loss_scaling(self) -> dict[str, Any]:
        """What the ZeRO optimizer keeps of its loss scale, by its attributes' names."""
        names = ("loss_scaler", "dynamic_loss_scale", "overflow")
        if any(name not in self._first for name in names):
            raise StateError(
                f"{self.folder} holds optimizer shards in a layout that cannot be divided anew (gradient "
                "accumulation in another dtype?); resume it with the ranks and settings it was saved with"
            )
        return {name: self._first[name] for name in names}

    def holds(self, kind: str) -> bool:
        """Whether there is state of this kind."""
        return any(kind in state for state in self._optimizers[0]["state"].values())

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` .. `stop` of a flattened parameter's fp32 weights or moment, fp32 on the CPU.

        Args:
            kind: `MASTER`, one of `MOMENTS`, or another that it `holds`.

        Raises:
            StateError: the checkpoint does not hold them.
        """
        pieces = []
        for span in cut(self.spans.get(name, []), start, stop):
            if kind == MASTER:
                flat = self._master[span.rank][span.group]
            else:
                flat = self._optimizers[span.rank]["state"][span.group][kind]
            pieces.append(flat.detach().narrow(0, span.offset, span.numel).float())
        found = sum(piece.numel() for piece in pieces)
        if found != stop - start:
            raise StateError(
                f"{self.folder}: parameter {name} has {found} of the {stop - start} elements needed; was it "
                "written by another model?"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _check_sizes(self, shapes: Sequence[Mapping[str, Sequence[int]]], sizes: list[list[int]]) -> None:
        """Refuse shards of stage 3 that are not divided by `spans_of_stage3`."""
        expected = [
            sum(math.ceil(math.prod(shape) / len(sizes)) for shape in members.values()) for members in shapes
        ]
        for rank, found in enumerate(sizes):
            if found != expected:
                raise StateError(
                    f"{self.folder}: the shard of rank {rank} has {sum(found)} fp32 weights where "
                    f"{sum(expected)} are expected: they lie elsewhere (optimizer offloaded to NVMe) or are "
                    "divided otherwise (MiCS); resume the run with the ranks and settings it was saved with, "
                    "and let it export at its end (checkpoint.export_at_end)"
                )


class SavedWeights(Mapping[str, torch.Tensor]):
    """The model of a checkpoint: name in `PackedCausalLM` -> tensor on the CPU, read when it is asked for.

    Parameters come as fp32 master weights; buffers, and parameters that were not trained, as they were saved.
    The order is the model's, and a parameter with several names has its first one only.

    Args:
        folder: a sound checkpoint. own_state: the state of ours in it (`engine/checkpointing/folder.py`),
        which knows the ranks and the ZeRO stage. kind: what of the trained parameters.

    Raises:
        StateError: files in a layout that is not known, or without that kind.
    """

    def __init__(self, folder: Path, own_state: Mapping[str, Any], kind: str = MASTER) -> None:
        self._folder, self._kind = folder, kind
        with _known_layout(folder):
            self._world_size = int(own_state["world_size"])
            is_sharded = own_state["layout"]["ZeRO stage"] > 0
            self._shards = SavedShards(folder, self._world_size) if is_sharded else None
            lacks = kind != MASTER and not (self._shards and self._shards.holds(kind))
            state = self._shards.model_state if self._shards else mapped(folder / model_file(None))
            self._module: Mapping[str, torch.Tensor] = state["module"]
            groups = state["param_shapes"] or []
            self._trained = {name: tuple(shape) for group in groups for name, shape in group.items()}
            self._partitioned = {
                name: tuple(shape)
                for name, shape in (state["frozen_param_shapes"] or {}).items()
                if self._shards and self._shards.is_partitioned
            }
            shared = state["shared_params"] if self._shards else _repeated(self._module)
            self._names = [name for name in self._module if name not in shared]
        if lacks:
            raise StateError(f"{folder} holds no {kind} of the weights; optimizer.ema_decay keeps one")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._shards and name in self._trained:
            shape = self._trained[name]
            return self._shards.read(name, self._kind, 0, math.prod(shape)).view(shape)
        if name in self._partitioned:
            return self._read_untrained(name)
        return self._module[name].detach()

    def _read_untrained(self, name: str) -> torch.Tensor:
        """A parameter that ZeRO-3 has partitioned and no optimizer holds."""
        shape = self._partitioned[name]
        with _known_layout(self._folder):
            states = [mapped(self._folder / model_file(rank)) for rank in range(self._world_size)]
            parts = [state["frozen_param_fragments"][name].flatten() for state in states]
            return torch.cat(parts)[: math.prod(shape)].view(shape)


def model_file(rank: int | None) -> str:
    """Name of the file with a rank's part of the model (stage 3), or with all of it (None)."""
    part = "" if rank is None else f"zero_pp_rank_{rank}_"
    return f"{part}mp_rank_00_model_states.pt"


def mapped(path: Path) -> Any:
    """A DeepSpeed file without its bytes: tensors are read when they are copied from. No code is run.

    Raises:
        StateError: no such file, or no file that torch wrote.
    """
    try:
        with tensors_only(path):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StateError(
            f"{path} cannot be read: {reason}. Restore it from a copy, or use another checkpoint"
        ) from error


def _repeated(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names whose very elements another name before them has."""
    seen, repeated = set(), set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            repeated.add(name)
        seen.add(place)
    return repeated


@contextmanager
def _known_layout(folder: Path) -> Iterator[None]:
    """Within it files are taken for what DeepSpeed writes; StateError where they are something else."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise StateError(
            f"{folder}: files in another layout than DeepSpeed 0.19.8 writes for this program "
            f"({type(error).__name__}: {error}); use a checkpoint that this program wrote, and the DeepSpeed "
            "that wrote it (run.json of the run says which)"
        ) from error


def _rank_in_name(path: Path) -> int:
    return int(path.name.split("zero_pp_rank_")[1].split("_")[0])
