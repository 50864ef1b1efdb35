"""What a user may give as a model, and the Hugging Face folder that it stands for.

A Hugging Face folder or hub name, a run folder (its exported model, else its best or newest checkpoint) or a
checkpoint folder. Checkpoints are exported first (`engine/checkpointing/hf_export.py`), beside their run, and
kept.

What is not covered: exports that take longer than the process group waits; run `versatune-ds export` first
for very large models.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from versatune_ds.config.schema import Config
from versatune_ds.engine.checkpointing.folder import NAME, best_or_newest, damage
from versatune_ds.engine.checkpointing.hf_export import export_from_run
from versatune_ds.engine.fingerprints import weight_files
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError, StateError
from versatune_ds.foundations.files import folder_name
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)


class Target(NamedTuple):
    source: str
    """Hugging Face folder, or hub name."""
    out: Path
    """Where its results go unless told otherwise."""


def resolve_target(name: str, config: Config) -> Target:
    """What `--model` names; exports a checkpoint if need be. A collective.

    Args:
        name: folder, run folder, checkpoint folder or hub name.
        config: the run's settings; results of models from elsewhere go below its run folder.

    Raises:
        ConfigError: nothing of the kind, or a folder without weights.
        StateError: a run without a model or checkpoint, or a damaged checkpoint.
    """
    path = Path(name)
    if not path.is_dir():
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"--model {name} is not a folder; give a model, run or checkpoint folder")
        return Target(name, config.run.dir / constants.EVALUATIONS_DIR / folder_name(name))
    if (path / constants.RESOLVED_CONFIG_FILE).is_file():
        return Target(_model_of_run(path), path)
    if (path / constants.CHECKPOINT_MANIFEST_FILE).is_file() and NAME.fullmatch(path.name):
        run = path.resolve().parent.parent
        return Target(
            distributed.on_main(_export, run, path, False), run / constants.EVALUATIONS_DIR / path.name
        )
    if _is_model(path):
        if not weight_files(path):
            raise ConfigError(
                f"--model {name} has a configuration and no weights (*.safetensors); give a trained model, "
                f"for example the folder {constants.EXPORT_DIR}/ of a finished run"
            )
        run = path.resolve().parent
        is_export = path.name == constants.EXPORT_DIR and (run / constants.RESOLVED_CONFIG_FILE).is_file()
        elsewhere = config.run.dir / constants.EVALUATIONS_DIR / folder_name(path.resolve().name)
        return Target(str(path), path.parent if is_export else elsewhere)
    raise ConfigError(
        f"--model {name} is neither a Hugging Face folder (config.json, or adapter_config.json), nor a run "
        f"folder ({constants.RESOLVED_CONFIG_FILE}), nor a checkpoint ({constants.CHECKPOINT_MANIFEST_FILE})"
    )


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, or an adapter for one."""
    return any((folder / name).is_file() for name in ("config.json", constants.ADAPTER_CONFIG_FILE))


def _model_of_run(run: Path) -> str:
    """The exported model of a run, or of its best or else newest sound checkpoint."""
    model = run / constants.EXPORT_DIR
    if _is_model(model):
        return str(model)
    checkpoint = best_or_newest(run / constants.CHECKPOINTS_DIR)
    if checkpoint is None:
        raise StateError(
            f"{run} holds neither {constants.EXPORT_DIR}/ nor a checkpoint: the run has not got that far; "
            "set checkpoint.every_n_steps to have checkpoints before its end"
        )
    log.info("%s has no %s/ yet: its checkpoint %s is evaluated", run, constants.EXPORT_DIR, checkpoint.name)
    return distributed.on_main(_export, run, checkpoint, True)


def _export(run: Path, checkpoint: Path, is_sound: bool) -> str:
    """A checkpoint as a Hugging Face folder beside its run; one that is there and newer is used again.

    Args:
        is_sound: the ranks have just read every byte of it; else that is done here.
    """
    target = run / f"{constants.EXPORT_DIR}-{checkpoint.name}"
    made_at = (checkpoint / constants.CHECKPOINT_MANIFEST_FILE).stat().st_mtime
    if not _is_model(target) or target.stat().st_mtime < made_at:
        if not is_sound and (found := damage(checkpoint)) is not None:
            raise StateError(f"{checkpoint} is damaged: {found}; give another checkpoint")
        log.info("exporting %s to %s", checkpoint, target)
        export_from_run(run, checkpoint, target)
    return str(target)
