"""Data sets on the hub, streamed with `datasets` (extra `hub`) at a fixed commit.

What is not covered: data sets that need a configuration name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.blocks import Block
from versatune_ds.data.rows.files import HUB_PREFIX, InputFile
from versatune_ds.data.rows.reasons import FileDamage, Reason
from versatune_ds.data.rows.tables import by_name
from versatune_ds.foundations.errors import ConfigError, DataError


def hub_blocks(file: InputFile) -> Iterator[Block]:
    """Blocks of a data set on the hub (see `readers.read_blocks`)."""
    load_dataset = _datasets().load_dataset
    name, first = file.path.removeprefix(HUB_PREFIX), 1
    try:
        data = load_dataset(name, split=file.split, streaming=True, revision=file.revision or None)
        features = (getattr(data, "features", None) or {}).items()
        labels = {column: list(feature.names) for column, feature in features if hasattr(feature, "names")}
        rows = (by_name(row, labels) for row in data)
        while items := tuple(islice(rows, blocks.BLOCK_ROWS // 2)):
            yield Block(first, items, num_rows=len(items))
            first += len(items)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot be read from the hub: {error}; check name, split {file.split!r} and the network",
            path=file.path,
        ) from error
    if first == 1:
        yield Block(1, damage=FileDamage(Reason.EMPTY_FILE, f"the split {file.split!r} holds no row"))


def hub_revision(path: str) -> str:
    """Commit hash of a hub data set, asked from the hub.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: the hub does not know the data set or cannot be reached.
    """
    _datasets()
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path.removeprefix(HUB_PREFIX)).sha)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot be found on the hub: {error}", path=path) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "hub data sets need the package `datasets`: install the extra, `pip install versatune-ds[hub]`, "
            "or name local files"
        ) from None
    return datasets
