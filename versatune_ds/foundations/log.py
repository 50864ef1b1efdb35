"""Logging: short lines on standard error. Rank 0 speaks for all; another rank only reports its own errors.

What is not covered: metrics (see `versatune_ds.observability`); this is for people.
"""

from __future__ import annotations

import logging
import os
import sys

ROOT = "versatune_ds"


class RankFormatter(logging.Formatter):
    """Plain text for information; level and rank in front of anything worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        rank = os.environ.get("RANK")
        where = f" [rank {rank}]" if rank is not None else ""
        return f"{record.levelname.lower()}{where}: {text}"


def setup_logging() -> None:
    """Send the package's log to standard error; ranks other than 0 are raised to errors.

    DeepSpeed's and transformers' own chatter is kept to warnings on rank 0.
    """
    logger = logging.getLogger(ROOT)
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RankFormatter())
    logger.addHandler(handler)
    logger.propagate = False
    is_main = os.environ.get("RANK", "0") == "0"
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    for chatty in ("DeepSpeed", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING if is_main else logging.ERROR)


def get_logger(name: str) -> logging.Logger:
    """Logger of a module; `name` is the module's `__name__`."""
    return logging.getLogger(name)
