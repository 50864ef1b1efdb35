"""Checkpoints that are complete or invisible.

A checkpoint is written into a hidden folder (`engine/checkpointing/saver.py`), every file is hashed into a
manifest, and only then the folder gets its name; `latest.json` follows, and `best.json` if its evaluation was
the best. A crash at any moment leaves the older checkpoints untouched. Loading verifies the manifest first: a
damaged newest checkpoint is reported with its reason and the one before is used.

Inside: DeepSpeed's model and optimizer shards, one file of our own state (planner cursor, weights, statistics
window, file offsets, counters), one file of random generator states per rank, and the manifest.

A run may go on on another number of ranks, in another ZeRO stage from 1 to 3, and with or without optimizer
offload (`engine/backend/reshard.py`).

What is not covered: when and by whom files are written, and run folders that the ranks do not share.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from versatune_ds.config.schema import Checkpoint
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.zero_sizes import DEEPSPEED_SUB_GROUP, SUB_GROUP_KEY
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import (
    canonical_hash,
    fsync_dir,
    remove_temporaries,
    sha256_file,
    write_json_atomic,
)
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

VERSION = 1
NAME = re.compile(r"step-(\d{8})")
UNFINISHED_PREFIX = ".unfinished-"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` finished steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint folder."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def unfinished_name(step: int) -> str:
    """Folder name of a checkpoint while it is written."""
    return f"{UNFINISHED_PREFIX}{checkpoint_name(step)}"


def generator_name(rank: int) -> str:
    """File of a rank's random generator states."""
    return f"generators_rank_{rank:05d}.safetensors"


def part_name(rank: int) -> str:
    """A rank's list of the files that it wrote, until rank 0 merges them."""
    return f"manifest_rank_{rank:05d}.json"


def begin(folder: Path, temporary: Path) -> None:
    """Make the folder of a new checkpoint and remove what crashes have left; rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"{UNFINISHED_PREFIX}*"):
        shutil.rmtree(unfinished)
    remove_temporaries(folder / constants.LATEST_FILE)
    remove_temporaries(folder / constants.BEST_FILE)
    temporary.mkdir()


def publish(
    temporary: Path,
    step: int,
    world_size: int,
    settings: Checkpoint,
    best: Mapping[str, Any] | None = None,
    needed: Collection[int] = (),
) -> Path:
    """Make a written checkpoint visible and prune older ones by `settings`; rank 0 only.

    Args:
        temporary: its folder, with the lists of all ranks.
        world_size: ranks that have written.
        best: note on the best evaluation, which may be that of another step.
        needed: steps whose checkpoints stay.
    """
    folder = temporary.parent
    files: dict[str, Any] = {}
    parts = [temporary / part_name(rank) for rank in range(world_size)]
    for path in parts:
        files.update(json.loads(path.read_text(encoding="utf-8")))
    write_json_atomic(temporary / constants.CHECKPOINT_MANIFEST_FILE, {"version": VERSION, "files": files})
    for path in parts:
        path.unlink()
    # Going on from an older checkpoint abandons the newer ones (damaged, or this very step).
    _remove(path for path in list_checkpoints(folder) if step_of(path) >= step)
    final = folder / checkpoint_name(step)
    temporary.rename(final)
    fsync_dir(folder)
    write_json_atomic(folder / constants.LATEST_FILE, {"checkpoint": final.name, "step": step})
    keep(folder, settings, best if best and best["step"] == step else None, needed)
    return final


def keep(
    folder: Path,
    settings: Checkpoint,
    best: Mapping[str, Any] | None = None,
    needed: Collection[int] = (),
) -> None:
    """Write down which checkpoint is the best, if that is a new one, and prune the others; rank 0 only.

    There stay the newest `keep_last` checkpoints, the milestones, the best one and those `needed`.
    """
    if best is not None:
        _note_best(folder, best)
    milestone, noted = settings.milestone_every_n_steps, read_best(folder)
    old = list_checkpoints(folder)[settings.keep_last :]
    kept = {checkpoint_name(step) for step in needed} | {noted and noted["checkpoint"]}
    _remove(p for p in old if p.name not in kept and not (milestone and step_of(p) % milestone == 0))


def restore_best(folder: Path, best: Mapping[str, Any] | None) -> bool:
    """Write down the best checkpoint as the run knows it that starts now; rank 0 only.

    Args:
        best: None: there is none.

    Returns:
        Whether it is there.
    """
    if best is not None and (folder / checkpoint_name(best["step"])).is_dir():
        _note_best(folder, best)
        return True
    (folder / constants.BEST_FILE).unlink(missing_ok=True)
    return False


def _note_best(folder: Path, best: Mapping[str, Any]) -> None:
    write_json_atomic(folder / constants.BEST_FILE, {"checkpoint": checkpoint_name(best["step"]), **best})


def read_best(folder: Path) -> dict[str, Any] | None:
    """The note on the best checkpoint, or None where none is kept.

    Raises:
        StateError: it cannot be read.
    """
    path = folder / constants.BEST_FILE
    if not path.is_file():
        return None
    note = _read(path, "step", "remove it, and say which checkpoint you want")
    return {"checkpoint": checkpoint_name(int(note["step"])), **note}


def _read(path: Path, key: str, cure: str) -> dict[str, Any]:
    """A JSON file of ours with a whole number at `key`; StateError where it is not."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(content[key])
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} cannot be read ({type(error).__name__}: {error}); {cure}") from error


def best_or_newest(folder: Path) -> Path | None:
    """The best checkpoint where one is kept, else the newest sound one; says which. A collective.

    Raises:
        StateError: the best one is damaged, or checkpoints exist and none is sound.
    """
    note = distributed.on_main(read_best, folder)
    if note is None:
        return newest_sound_checkpoint(folder)
    path: Path = folder / note["checkpoint"]
    require_sound(path)
    log.info(
        "%s has the lowest held-out loss: %s of %s (evaluation.select)",
        path.name,
        note.get("loss"),
        note.get("select"),
    )
    return path


def require_sound(path: Path) -> None:
    """Refuse a checkpoint that is not as it was written; a collective.

    Raises:
        StateError: on all ranks.
    """
    problem = damage(path, distributed.rank(), distributed.world_size())
    cure = "restore it, or take another one: versatune-ds export RUN --newest, or --step N"
    error = None if problem is None else StateError(f"{path} is damaged: {problem}; {cure}")
    distributed.raise_together(error)


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as written; a collective, the same answer on all ranks.

    Raises:
        StateError: checkpoints exist but none is sound.
    """
    # rank 0's listing counts: on network file systems ranks may see different ones for a while
    candidates: list[Path] = distributed.gather_objects(list_checkpoints(folder))[0]
    for path in candidates:
        problem = damage(path, distributed.rank(), distributed.world_size())
        if distributed.all_agree(problem is None):
            return path
        if problem is not None:
            log.error("checkpoint %s is damaged and not used: %s", path, problem)
    if candidates:
        raise StateError(
            f"{folder}: none of the {len(candidates)} checkpoints is sound (reasons above); restore one "
            "from a copy, or start afresh with another run.dir"
        )
    return None


def saved_state(path: Path) -> dict[str, Any]:
    """Our own state of a checkpoint, whoever wants to read it.

    Raises:
        StateError: it has none, or one that another version of the format wrote.
    """
    cure = "use a checkpoint that this program wrote"
    state = _read(path / constants.CHECKPOINT_STATE_FILE, "version", cure)
    if (version := state["version"]) != VERSION:
        raise StateError(
            f"{path}: state version {version}, this program reads {VERSION}; use the program that wrote it"
        )
    return state


def read_state(path: Path, layout: dict[str, Any], architecture: Mapping[str, str]) -> dict[str, Any]:
    """Our own state of a checkpoint that this run wants to go on from.

    Args:
        layout: how this run lays out model and optimizer state (ZeRO stage, dtype, offload).
        architecture: of this run's model.

    Raises:
        StateError: as `saved_state`, or another model, or a layout that cannot become this run's.
    """
    state = saved_state(path)
    old = state.get("architecture", {})  # checkpoints did not always say
    changed = [
        f"{key} is {old[key]} there and {architecture[key]} in model.source"
        for key in sorted(architecture.keys() & old.keys())
        if old[key] != architecture[key]
    ]
    if changed:
        raise StateError(f"it holds another model: {', '.join(changed)}; set that back")
    # what older layouts do not speak of
    groups = DEEPSPEED_SUB_GROUP if state["layout"]["ZeRO stage"] == 3 else None
    saved = state["layout"] = {
        "model.adapter": None,
        SUB_GROUP_KEY: groups,
        "optimizer.states": "fp32",
        "optimizer.kind": "adamw",
        **state["layout"],
    }
    unsharded = "ZeRO stage 0" if 0 in (saved["ZeRO stage"], layout["ZeRO stage"]) else None
    changes = (
        ("model.dtype", "another precision"),
        ("model.adapter", "another adapter"),
        ("optimizer.kind", "another optimizer"),
        ("ZeRO stage", unsharded),
    )
    for key, why in changes:
        if why is not None and saved[key] != layout[key]:
            raise StateError(
                f"it was written with {key} {saved[key]!r}; this run has {layout[key]!r}, and {why} cannot "
                "go on from it; set it back"
            )
    return state


def load_model_state(path: Path, backend: Backend, state: dict[str, Any]) -> None:
    """Load model, optimizer and random generator states; every rank calls it.

    With the number of ranks and the layout it was saved in, the run goes on bit for bit. Otherwise the
    generators are seeded from the checkpoint's name and the rank: generator states belong to ranks. (Only
    an adapter's dropout and the rounding of `optimizer.states` draw from them.)
    """
    backend.load(path, state["layout"], state["world_size"])
    if state["world_size"] == distributed.world_size():
        states = load_file(path / generator_name(distributed.rank()))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], backend.device)
    else:
        seed = canonical_hash([path.name, distributed.rank()])
        torch.manual_seed(int(seed[:15], 16))


def generator_states() -> dict[str, torch.Tensor]:
    """States of this rank's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with one rank's share of a checkpoint's files (by default with any of them), or None."""
    try:
        manifest = json.loads((folder / constants.CHECKPOINT_MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{constants.CHECKPOINT_MANIFEST_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{constants.CHECKPOINT_MANIFEST_FILE} cannot be read: {error}"
    for name in sorted(files)[rank::world_size]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size, (expected, sha256) = path.stat().st_size, files[name]
        if size != expected:
            return f"{name} has {size} bytes instead of {expected}"
        if sha256_file(path) != sha256:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def _remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints; a crash in the middle leaves nothing that looks whole."""
    for path in paths:
        doomed = path.with_name(f"{UNFINISHED_PREFIX}{path.name}-removed")
        path.rename(doomed)
        if doomed.is_symlink():  # moved elsewhere, which was not this program
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
