"""Names and numbers that several floors share.

What is not covered: settings a user may change (see `versatune_ds.config.schema`).
"""

from typing import Final

IGNORE_INDEX: Final = -100
"""Label of a position without supervision; the value that torch's cross-entropy ignores by default."""

PADDING_ID: Final = -1
"""Sample and domain id of padding positions in a pack."""

# Files of a run folder.
RESOLVED_CONFIG_FILE: Final = "resolved.yaml"
METRICS_FILE: Final = "metrics.jsonl"
WEIGHTS_FILE: Final = "weights.jsonl"
EVAL_FILE: Final = "eval.jsonl"
SKIPPED_STEPS_FILE: Final = "skipped_steps.jsonl"
RUN_INFO_FILE: Final = "run.json"
REPORT_FILE: Final = "report.html"
CHECKPOINTS_DIR: Final = "checkpoints"
EXPORT_DIR: Final = "model"

# Files of a checkpoint folder.
CHECKPOINT_STATE_FILE: Final = "versatune_state.json"
CHECKPOINT_MANIFEST_FILE: Final = "manifest.json"
LATEST_FILE: Final = "latest.json"

# Exit codes of the command line (documented in docs/train.md).
EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_DATA: Final = 3
EXIT_STATE: Final = 4
EXIT_DIVERGED: Final = 5
EXIT_SAVE: Final = 6
