"""Names and numbers that several floors share.

What is not covered: settings a user may change (see `versatune_ds.config.schema`).
"""

from typing import Final

IGNORE_INDEX: Final = -100
"""Label of a position without supervision; the value that torch's cross-entropy ignores by default."""

PADDING_ID: Final = -1
"""Sample id of padding positions in a pack."""

# Files of a run folder.
RESOLVED_CONFIG_FILE: Final = "resolved.yaml"
METRICS_FILE: Final = "metrics.jsonl"
WEIGHTS_FILE: Final = "weights.jsonl"
EVAL_FILE: Final = "eval.jsonl"
ANSWERS_FILE: Final = "answers.jsonl"
SKIPPED_STEPS_FILE: Final = "skipped_steps.jsonl"
RUN_INFO_FILE: Final = "run.json"
REPORT_FILE: Final = "report.html"
EVALUATION_FILE: Final = "evaluation.json"
EVALUATION_PICTURE_FILE: Final = "evaluation.png"
EVALUATIONS_DIR: Final = "evaluations"
REFERENCE_DIR: Final = "reference"
REFERENCE_FILE: Final = "reference.json"
RUN_LOCK_FILE: Final = "run.lock"
RUN_HOLDER_FILE: Final = "run.lock.json"
CHECKPOINTS_DIR: Final = "checkpoints"
EXPORT_DIR: Final = "model"
EXPORT_FILE: Final = "versatune_export.json"
PROFILE_DIR: Final = "profile"
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"

# Files of a profile folder.
PROFILE_FILE: Final = "profile.json"
PROFILE_TRACE_FILE: Final = "trace.json.gz"
PROFILE_MEMORY_FILE: Final = "memory.pickle"

# Files of a checkpoint folder.
CHECKPOINT_STATE_FILE: Final = "versatune_state.json"
CHECKPOINT_MANIFEST_FILE: Final = "manifest.json"
LATEST_FILE: Final = "latest.json"
BEST_FILE: Final = "best.json"

# Exit codes of the command line; docs/faults.md says what to do about each.
EXIT_OK: Final = 0
"""Finished, or stopped as asked after saving."""
EXIT_FAILURE: Final = 1
"""Anything without a code of its own."""
EXIT_USAGE: Final = 2
"""Settings or usage."""
EXIT_DATA: Final = 3
"""Input data."""
EXIT_STATE: Final = 4
"""A cache, checkpoint or run folder is missing, damaged, in use, or belongs to something else."""
EXIT_DIVERGED: Final = 5
"""Too many steps in a row had to be skipped."""
EXIT_PEER_LOST: Final = 6
"""Another rank was killed, or the connection to it was lost."""
EXIT_HANG: Final = 7
"""A rank gave no sign of life, or made no progress, for `run.hang_timeout_s`."""
EXIT_LAUNCHER_LOST: Final = 8
"""The launcher was gone and the next step boundary could not be reached."""
EXIT_SAVE: Final = 9
"""A checkpoint or the finished model could not be written."""
