"""Writing the trained model as a Hugging Face folder, one shard at a time.

`export_model` gathers the parameters of a live backend one by one; `export_checkpoint` takes them one by one
out of the mapped files of a checkpoint of any ZeRO stage (`engine/backend/saved_shards.py`), on a CPU without
any process group. Both hand (name, tensor) pairs to the same shard writer, which holds one shard in memory,
so the peak on any rank is one shard and one parameter. The folder appears whole or not.

Of a run that trained an adapter only the adapter is written (`adapter_export.py`), unless it is merged.

What is not covered: quantised formats, and pushing to a hub (`apps/push.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from versatune_ds.config.load import load_config
from versatune_ds.config.model import Model
from versatune_ds.config.schema import Config
from versatune_ds.data.encode.chat_encoder import stop_token
from versatune_ds.data.encode.tokenizer import load_tokenizer, set_chat_template
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.optimizer import AVERAGE
from versatune_ds.engine.backend.saved_shards import MASTER, SavedWeights
from versatune_ds.engine.checkpointing.adapter_export import (
    adapter_tensors,
    holds_head,
    is_of_adapter,
    merged_tensors,
    save_adapter_config,
)
from versatune_ds.engine.checkpointing.export_target import check_target, make_empty, replace, unfinished
from versatune_ds.engine.checkpointing.folder import saved_state
from versatune_ds.engine.model.router import as_published
from versatune_ds.engine.model.source import DTYPES, load_architecture
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError, SaveError, StateError, VersaTuneError
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

NAME_PREFIX = "lm."
"""Parameters of `PackedCausalLM` carry this prefix; Hugging Face's names do not."""


class ShardWriter:
    """Collects tensors and writes `model-xxxxx-of-yyyyy.safetensors` files of bounded size.

    Args:
        max_bytes: largest shard (one larger tensor gets a shard of its own).
        stem: of the files' names.
    """

    def __init__(self, folder: Path, max_bytes: float, stem: str = "model") -> None:
        self.folder, self.stem = folder, stem
        self.max_bytes = max_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._shard_bytes = 0
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a CPU tensor; writes the current shard first if the tensor does not fit into it."""
        if self._shard and self._shard_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> list[str]:
        """Write the last shard, give the files their final names, and write the index; returns all names."""
        self._flush()
        count = len(self._names)
        weight_map = {}
        for i, names in enumerate(self._names):
            part = "" if count == 1 else f"-{i + 1:05d}-of-{count:05d}"
            final = f"{self.stem}{part}.safetensors"
            self._path(i).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json_atomic(self.folder / f"{self.stem}.safetensors.index.json", index)
        return list(weight_map)

    def _path(self, i: int) -> Path:
        return self.folder / f"shard-{i:05d}.safetensors"

    def _flush(self) -> None:
        if self._shard:
            save_file(self._shard, self._path(len(self._names)), metadata={"format": "pt"})
            self._names.append(list(self._shard))
            self._shard, self._shard_bytes = {}, 0


class Companions(NamedTuple):
    """What lies beside the weights: tokenizer with its chat template, and how to generate."""

    tokenizer: Any
    generation: GenerationConfig
    adapter_of: Model | None = None
    """`model` section, where an adapter is written and not a whole model."""

    @classmethod
    def of(cls, config: Config, tokenizer: Any, architecture: Any) -> Companions:
        """Of a run's model: generation ends at the stop token that turns were trained to end with."""
        try:
            generation = GenerationConfig.from_pretrained(config.model.source)
        except OSError:  # the source has none
            generation = GenerationConfig.from_model_config(architecture)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"model.source {config.model.source}: transformers refuses its generation_config.json "
                f"({error}); mend that file"
            ) from error
        stop = stop_token(tokenizer, config.data.chat_template)
        generation.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
        generation.use_cache = True  # switched off for training only
        return cls(tokenizer, generation, config.model if config.model.adapter else None)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.adapter_of is not None:
            return
        try:
            self.generation.save_pretrained(folder)
        except ValueError as error:  # what it takes from a model it does not write once anything is changed
            log.warning(
                "generation_config.json goes into the finished model as model.source has it, with what "
                "transformers finds wrong there: %s",
                " ".join(str(error).split()),
            )
            self.generation.to_json_file(folder / "generation_config.json")


def export_model(backend: Backend, companions: Companions, folder: Path, max_shard_bytes: int) -> None:
    """Write the model of a live backend; every rank calls it, rank 0 writes.

    Args:
        folder: target; an earlier export there is replaced.
        max_shard_bytes: bound of a shard, and of the host memory needed.

    Raises:
        SaveError, StateError: on all ranks, when rank 0 could not write.
    """
    whole, config = companions.adapter_of is None, backend.model.lm.config
    parameters = backend.parameters() if whole else backend.parameters(is_of_adapter)
    copies: Iterable[tuple[str, torch.Tensor]] = (
        (name.removeprefix(NAME_PREFIX), tensor.detach().to("cpu", copy=True)) for name, tensor in parameters
    )
    copies = as_published(config, copies) if whole else copies

    def write() -> None:
        try:
            if distributed.is_main():
                _write_folder(copies, config, companions, folder, max_shard_bytes)
        finally:
            for _ in parameters:  # the other ranks' part, and that of a rank 0 that could not write
                pass

    distributed.together(write)


def export_checkpoint(
    checkpoint: Path,
    config: Any,
    companions: Companions,
    folder: Path,
    dtype: str,
    max_shard_bytes: int,
    merge: bool = False,
    ema: bool = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or as an adapter folder, on one CPU process.

    Args:
        checkpoint: a finished checkpoint folder, of any ZeRO stage.
        folder: target; an earlier export there is replaced.
        dtype: "bf16", "fp16" or "fp32"; fp32 master weights are rounded to it.
        max_shard_bytes: bound of a shard. Host memory holds one shard and one parameter.
        merge: add the adapter to the base model's weights, and write the whole model.
        ema: the average of the weights (`optimizer.ema_decay`) in their place.

    Raises:
        ConfigError: nothing to merge, or no base model to merge into.
        StateError: the checkpoint's files are not as this program writes them or hold no average, or the
            target holds others.
        SaveError: the folder could not be written.
    """
    weights = SavedWeights(checkpoint, saved_state(checkpoint), AVERAGE if ema else MASTER)
    config.dtype = DTYPES[dtype]
    if NAME_PREFIX + "lm_head.weight" in weights:
        config.tie_word_embeddings = False  # of a model whose configuration does not say what its files hold
    exact: Iterable[tuple[str, torch.Tensor]] = (
        (name.removeprefix(NAME_PREFIX), weights[name]) for name in weights
    )
    if merge:
        settings = companions.adapter_of
        if settings is None:
            raise ConfigError("--merge adds an adapter to its base model; this run trained the whole model")
        exact = merged_tensors(settings, dict(adapter_tensors(exact)))
        companions = companions._replace(adapter_of=None)
        config.tie_word_embeddings &= not holds_head(settings.source)
    elif companions.adapter_of is None:
        exact = as_published(config, exact)
    # buffers of whole numbers stay what they are
    rounded = ((name, t.to(config.dtype) if t.is_floating_point() else t) for name, t in exact)
    _write_folder(rounded, config, companions, folder, max_shard_bytes)


def export_from_run(
    run_dir: Path, checkpoint: Path, target: Path, merge: bool = False, ema: bool = False
) -> None:
    """`export_checkpoint` with the settings, tokenizer and architecture of the run that made it.

    Args:
        run_dir: the run folder; its resolved.yaml is read.

    Raises:
        ConfigError: its settings, model or tokenizer cannot be found any more.
        StateError, SaveError: as `export_checkpoint`.
    """
    config = load_config(run_dir / constants.RESOLVED_CONFIG_FILE)
    tokenizer = load_tokenizer(config)
    set_chat_template(tokenizer, config.data.chat_template)
    architecture = load_architecture(config.model)
    shard_bytes = int(config.checkpoint.export_shard_gb * 1e9)
    companions = Companions.of(config, tokenizer, architecture)
    dtype = config.model.dtype
    export_checkpoint(checkpoint, architecture, companions, target, dtype, shard_bytes, merge, ema)


def try_export(config: Config, architecture: Any, companions: Companions) -> None:
    """All of the export at the end but the weights, taken away again; rank 0 only, before the first step.

    Raises:
        StateError: the folder may not be replaced, or cannot be written.
        ConfigError: a library refuses to save tokenizer or configuration.
    """
    folder = config.run.dir / constants.EXPORT_DIR
    temporary = unfinished(check_target(folder))
    try:
        make_empty(temporary)
        _write_companions(companions, architecture, temporary)
    except OSError as error:
        raise StateError(f"{folder} cannot be written ({error.strerror or error}); see to it") from error
    except Exception as error:  # of whatever library
        raise ConfigError(
            f"the model of this run could not be saved at its end: {type(error).__name__}: {error}. Mend the "
            f"files of model.source {config.model.source}, or set checkpoint.export_at_end: false"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_folder(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Any,
    companions: Companions,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write the folder under a hidden name, then give it its own; a failure leaves nothing.

    Args:
        tensors: (Hugging Face name, CPU tensor), made one at a time.
    """
    folder = check_target(folder)
    temporary = unfinished(folder)
    try:
        make_empty(temporary)
        _write_companions(companions, config, temporary)
        adapter_of = companions.adapter_of
        writer = ShardWriter(temporary, max_shard_bytes)
        if adapter_of is not None:  # peft reads a single file
            tensors = adapter_tensors(tensors)
            writer = ShardWriter(temporary, math.inf, "adapter_model")
        for name, tensor in tensors:
            writer.add(name, tensor)
        names = writer.close()
        if adapter_of is not None:
            save_adapter_config(adapter_of, names, temporary)
        replace(temporary, folder)
    except Exception as error:  # of the disk, or of whatever library
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, VersaTuneError):
            raise
        raise SaveError(
            f"the model could not be written into {folder}: {error}; see to that, or take another folder"
        ) from error


def _write_companions(companions: Companions, config: Any, folder: Path) -> None:
    """What lies beside the weights, first: a library that refuses to save it does so before the work."""
    companions.save(folder)
    if companions.adapter_of is None:
        config.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings["use_cache"] = True  # switched off for training only
        write_json_atomic(folder / "config.json", settings)
