"""Settings of small detections, and a script that runs one on a rank that `launch` starts.

Usage: detect_cases.py CASES.json, a list of {"config": FILE, "out": FOLDER, "overrides": [...]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

NAMES = ("law", "code", "other")


def write_config(path: Path, model: Path, url: str, **detect: Any) -> Path:
    """Settings of a small detection with a judge at `url`."""
    settings = {
        "run": {"dir": str(path.parent / "run")},
        "model": {"source": str(model), "dtype": "fp32"},
        "data": {"train": [{"path": "unused.jsonl", "domain": "law"}], "chat_template": "chatml"},
        "domains": {"names": list(NAMES)},
        "batch": {"packs_per_step": 1},
        "train": {"max_steps": 1},
        "detect": {
            "sequences": 20,
            "rounds": 2,
            "max_new_tokens": 12,
            "repetition_penalty": 1.0,
            "batch_size": 8,
            "judge": {
                "kind": "endpoint",
                "endpoint": {"url": url, "model": "judge", "concurrency": 2, "retries": 1},
            },
            **detect,
        },
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def main() -> None:
    from versatune_ds.apps.detect.run import DetectContext, detect_in_group
    from versatune_ds.config.load import load_config
    from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
    from versatune_ds.engine.faults.signals import StopRequest
    from versatune_ds.foundations.log import setup_logging

    setup_logging()
    device = start_process_group()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(case["config"], case["overrides"])
        detect_in_group(config, DetectContext(Path(case["out"]), device, StopRequest()))
    close_process_group()


if __name__ == "__main__":
    main()
