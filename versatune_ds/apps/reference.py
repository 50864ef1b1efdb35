"""`versatune-ds reference`: reference losses by training on each domain, from a finished model, or given.

The default trains `reference.model` on each domain with the run's own trainer until the held-out loss has not
fallen for `reference.patience` evaluations, and takes the lowest held-out loss with its standard error. Each
domain is a run in a folder of its own, so that a killed measurement goes on where it was: finished domains
are kept, an unfinished one resumes from its checkpoint. A domain whose settings, model or data changed since
is measured again.

What is not covered: the lowest of several evaluations on the same samples is a little too low on average (by
a fraction of its standard error); a separate held-out set for choosing the step would cost data.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from versatune_ds.apps.evaluate.held_out import free_memory, measure, provenance
from versatune_ds.apps.evaluate.targets import resolve_target
from versatune_ds.config.derive import proxy_config, reference_adapter, single_domain_config
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.cache.text_bytes import bytes_per_token
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.domain.alarms import reference_alarms
from versatune_ds.domain.reference import REFERENCE_FORMAT, Fingerprints, ReferenceLosses, checked_losses
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.fingerprints import data_fingerprint, model_fingerprint
from versatune_ds.engine.model.source import count_parameters
from versatune_ds.engine.run import report_alarms
from versatune_ds.engine.train import train_in_group
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import DataError, DivergenceError, StateError
from versatune_ds.foundations.files import (
    canonical_hash,
    folder_name,
    read_json_object,
    require_own,
    write_json_atomic,
    writing,
)
from versatune_ds.foundations.log import get_logger
from versatune_ds.strategies.rules import learnable_potential
from versatune_ds.strategies.simplex import Vector

log = get_logger(__name__)

RESULT_FILE = "result.json"
FINGERPRINT_FILE = "measured_with.json"
SECTIONS_THAT_MATTER = ("model", "batch", "optimizer", "train", "evaluation")
"""Of a domain's settings; its data are told by their caches."""


def write_reference(
    config: Config, out: Path, *, model: str | None = None, losses: Mapping[str, float] | None = None
) -> Path | None:
    """Measure by one of the three ways and write reference.json; every rank calls it.

    Args:
        model: take this finished model's losses.
        losses: take these numbers.

    Returns:
        The file, or None when it was asked to stop; the same command then goes on.
    """
    require_own(out, {constants.REFERENCE_FILE: REFERENCE_FORMAT})
    if losses is not None:
        given = given_reference(config, losses)
        return distributed.on_main(_write, given, config, out)
    device = start_process_group()
    if model is not None:
        source = resolve_target(model, config).source
        reference: ReferenceLosses | None = reference_from_model(config, source, device)
    else:
        reference = reference_by_training(config, out, device)
    path = None if reference is None else distributed.on_main(_write, reference, config, out)
    close_process_group()
    return path


def _write(reference: ReferenceLosses, config: Config, out: Path) -> Path:
    path = out / constants.REFERENCE_FILE
    with writing(path, "give another --out"):
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, reference.to_json(DomainTable(config.domains.names)))
    return path


def reference_by_training(config: Config, out: Path, device: torch.device) -> ReferenceLosses | None:
    """Train on each domain alone and take the lowest held-out losses; a collective.

    Args:
        out: folder for the domains' runs, shared by all ranks.

    Returns:
        The losses, or None when it was asked to stop; the same command then goes on.

    Raises:
        ConfigError, DataError, StateError: settings or data cannot be used.
        DivergenceError: a domain without any finite held-out loss.
    """
    proxy = proxy_config(config)
    table = DomainTable(config.domains.names)
    caches = open_caches(proxy)
    _require_data(table, caches)
    tokenizer = load_tokenizer(proxy)
    fingerprints = Fingerprints(
        model=model_fingerprint(proxy.model),
        tokenizer=ChatEncoder.build(tokenizer, config.data.chat_template).fingerprint,
        data=data_fingerprint(caches["eval"], table.names),
    )
    num_parameters = count_parameters(proxy.model)
    adapter = reference_adapter(config, num_parameters)
    what = "all of it" if adapter is None else f"a {adapter.kind} adapter of rank {adapter.rank} beside it"
    log.info(
        "reference.adapter %s: of %s (%.3g parameters) each domain trains %s",
        config.reference.adapter if isinstance(config.reference.adapter, str) else "given",
        proxy.model.source,
        num_parameters,
        what,
    )
    results = []
    for i, name in enumerate(table.names):
        train_cache, held_out_cache = caches["train"][i], caches["eval"][i]
        assert train_cache is not None and held_out_cache is not None
        derived = single_domain_config(config, name, out / folder_name(name), train_cache.num_tokens, adapter)
        print_of_domain = canonical_hash(
            [
                {section: derived.model_dump(mode="json")[section] for section in SECTIONS_THAT_MATTER},
                [derived.run.seed, fingerprints.model, fingerprints.tokenizer],
                [train_cache.fingerprint, held_out_cache.fingerprint],
            ]
        )
        result = _of_domain(derived, print_of_domain, name, f"{i + 1} of {len(table)}", device)
        if result is None:
            return None
        results.append(result)
    losses = np.array([result["loss"] for result in results])
    before = np.array([result["loss_before"] for result in results])
    gamma = learnable_potential(before, losses)
    report_alarms(reference_alarms(table, before, losses, gamma, np.ones(len(table), dtype=bool)))
    return ReferenceLosses(
        losses=losses,
        stderr=np.nan_to_num([np.nan if r["stderr"] is None else r["stderr"] for r in results]),
        fingerprints=fingerprints,
        bytes_per_token=bytes_per_token(caches["eval"], table.names, tokenizer),
        method="early_stopping",
        provenance={
            **provenance(device),
            "model": proxy.model.source,
            "adapter": adapter and adapter.model_dump(mode="json"),
            "domains": dict(zip(table.names, results, strict=True)),
        },
    )


def reference_from_model(config: Config, source: str, device: torch.device) -> ReferenceLosses:
    """Held-out losses of a finished model as reference losses; a collective.

    Args:
        source: Hugging Face folder or hub name; it must share the settings' tokenizer.

    Raises:
        DataError: a domain without held-out data.
        ConfigError, StateError, DivergenceError: as `measure`.
    """
    table = DomainTable(config.domains.names)
    losses_only = config.evaluation.model_copy(update={"generate": None})
    evaluation = measure(config.model_copy(update={"evaluation": losses_only}), source, device)
    if lacking := [name for name in table.names if name not in evaluation.losses]:
        raise DataError(
            f"no held-out loss for {', '.join(lacking)}: a reference needs every domain; add a source to "
            "data.eval (and leave evaluation.domains unset)"
        )
    sums = evaluation.sums
    caches = open_caches(config)
    losses = sums.mean_loss()
    report_alarms(given_alarms(table, losses))
    return ReferenceLosses(
        losses=losses,
        stderr=np.nan_to_num(sums.stderr()),
        fingerprints=evaluation.fingerprints,
        bytes_per_token=bytes_per_token(caches["eval"], table.names, load_tokenizer(config)),
        method="evaluated",
        provenance={**evaluation.provenance, "model": source},
    )


def given_reference(config: Config, values: Mapping[str, float]) -> ReferenceLosses:
    """Numbers from elsewhere as reference losses, said to be of the settings' tokenizer.

    Args:
        values: nats per supervised token by domain, > 0.

    Raises:
        ConfigError: a domain is missing or unknown, or a number is not > 0.
    """
    table = DomainTable(config.domains.names)
    encoder = ChatEncoder.build(load_tokenizer(config), config.data.chat_template)
    given = checked_losses(values, {}, Fingerprints(tokenizer=encoder.fingerprint), table, "--losses")
    report_alarms(given_alarms(table, given.losses))
    written_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return dataclasses.replace(given, method="given", provenance={"written_at": written_at})


def given_alarms(table: DomainTable, losses: Vector) -> list[str]:
    """Alarms that need no other losses to compare with."""
    none = np.zeros(len(table))
    return reference_alarms(table, none, losses, none, none.astype(bool))


def _require_data(table: DomainTable, caches: Mapping[str, list[Any]]) -> None:
    for split, cure in (("train", "data.train"), ("eval", "data.eval")):
        lacking = [name for name, cache in zip(table.names, caches[split], strict=True) if cache is None]
        if lacking:
            raise DataError(
                f"no {'training' if split == 'train' else 'held-out'} data for {', '.join(lacking)}: a "
                f"reference loss is measured on held-out data after training on the domain; add a source to "
                f"{cure}, or leave the domain out of domains.names"
            )


def _of_domain(
    config: Config, fingerprint: str, name: str, place: str, device: torch.device
) -> dict[str, Any] | None:
    """The result of a domain's run, trained unless it was before; None when asked to stop. A collective.

    Args:
        fingerprint: of everything that decides the result.
        place: which of how many.
    """
    folder = config.run.dir
    with writing(folder, "give another --out"):
        result: dict[str, Any] | None = distributed.on_main(_finished, folder, fingerprint)
    if result is None:
        log.info(
            "reference of %s (%s): at most %d steps, learning rate %.3g",
            name,
            place,
            config.train.max_steps,
            config.optimizer.lr,
        )
        if not train_in_group(config, device):
            return None
        free_memory()
        result = distributed.on_main(_finish, folder, name)
    return result


def _finished(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of a domain measured before with the same settings, if any; what was measured with others is
    cleared away. Rank 0 looks."""
    known = folder / FINGERPRINT_FILE
    if folder.exists() and any(folder.iterdir()) and not known.is_file():
        raise StateError(f"{folder} exists and is not of a reference measurement; give another --out")
    if known.is_file() and read_json_object(known).get("fingerprint") != fingerprint:
        log.warning("%s was measured with other settings, model or data: it is measured again", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(known, {"fingerprint": fingerprint})
    return read_json_object(folder / RESULT_FILE) or None


def _finish(folder: Path, name: str) -> dict[str, Any]:
    """Take the best evaluation of a finished domain's run, write it down, and drop the run's checkpoints."""
    result = best_evaluation(folder, name)
    write_json_atomic(folder / RESULT_FILE, result)
    shutil.rmtree(folder / constants.CHECKPOINTS_DIR, ignore_errors=True)
    stderr = "" if result["stderr"] is None else f" +- {result['stderr']:.4f}"
    log.info(
        "reference of %s: %.4f%s after step %d (%.4f before training)",
        name,
        result["loss"],
        stderr,
        result["step"],
        result["loss_before"],
    )
    if result["still_falling"]:
        log.warning(
            "the held-out loss of %s was still falling at the last step: its reference is too high; raise "
            "reference.max_epochs or reference.lr",
            name,
        )
    return result


def best_evaluation(folder: Path, name: str) -> dict[str, Any]:
    """The lowest held-out loss of a domain in its run's eval.jsonl; DivergenceError where none is finite."""
    text = (folder / constants.EVAL_FILE).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    finite = [line for line in lines if line["domain_loss"][name] is not None]
    if not finite:
        raise DivergenceError(
            f"no evaluation of {name} gave a finite held-out loss ({folder}); lower reference.lr, or look at "
            f"the held-out samples of {name}"
        )
    best = min(finite, key=lambda line: line["domain_loss"][name])
    return {
        "loss": best["domain_loss"][name],
        "stderr": best["domain_stderr"][name],
        "step": best["step"],
        "loss_before": finite[0]["domain_loss"][name],
        "last_step": lines[-1]["step"],
        "samples": best["domain_samples"][name],
        "supervised_tokens": best["domain_supervised_tokens"][name],
        "still_falling": best is lines[-1],
    }
