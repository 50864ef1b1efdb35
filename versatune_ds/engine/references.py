"""The reference losses a run starts with: read, compared with the run's own tokenizer and data, converted.

What is not covered: making them (`apps/reference.py`), and the file's format (`domain/reference.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.text_bytes import bytes_per_token
from versatune_ds.domain.reference import Fingerprints, ReferenceLosses, load_reference
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.fingerprints import data_fingerprint, model_fingerprint
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)


def open_reference(
    config: Config,
    table: DomainTable,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    caches: Mapping[str, Sequence[Any]],
) -> ReferenceLosses | None:
    """`weights.reference` in nats per supervised token of this run, or None without one.

    It must have been measured with this run's tokenizer (or `weights.loss_unit` is `byte`), on this run's
    held-out data if it has any, and with `reference.model` if that is set.

    Args:
        tokenizer_fingerprint: of tokenizer and template.
        caches: `train` and `eval` caches per domain.

    Raises:
        ConfigError, DataError: it is damaged, or cannot be compared with this run's losses.
    """
    if config.weights.reference is None:
        return None
    expected = Fingerprints(
        model=_proxy_fingerprint(config),
        tokenizer=tokenizer_fingerprint,
        data=data_fingerprint(caches["eval"], table.names),
    )
    sizes = None
    if config.weights.loss_unit == "byte":
        measured_on = "eval" if config.weights.loss_source == "probe" else "train"
        sizes = bytes_per_token(caches[measured_on], table.names, tokenizer)
    reference = load_reference(config.weights.reference, table, expected, sizes)
    if reference is not None and reference.method is not None:
        model = reference.provenance.get("model")
        found = f" with {model}" if model else ""
        log.info("reference losses: %s (%s%s)", config.weights.reference, reference.method, found)
    return reference


def _proxy_fingerprint(config: Config) -> str | None:
    """Of `reference.model`; None when it is not set, or not here: a run does not need it."""
    if config.reference.model is None:
        return None
    try:
        return model_fingerprint(config.reference.model)
    except ConfigError as error:
        log.warning("reference.model cannot be compared with the reference's: %s", error)
        return None
