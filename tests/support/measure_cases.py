"""Trainings, reference losses and evaluations within one process group; a script started by `launch`.

Usage: measure_cases.py CASES.json, a list of cases: {"what": "train", "reference", "reference_from_model" or
"evaluate", "config": FILE, "overrides": [...], "out": FOLDER, "model": FOLDER}. With "stop_in": [NAME, STEP]
the last rank is told to stop in that step of the run in the folder NAME. Each case leaves
OUT/outcome_rank_R.json: error (type and text) or null, and result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from versatune_ds.apps.evaluate.held_out import evaluate_in_group
from versatune_ds.apps.reference import reference_by_training, reference_from_model
from versatune_ds.config.load import load_config
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine import train
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.log import setup_logging

ORIGINAL_RUN_STEP = train.run_step


def stop_in(domain: str, step_to_stop: int) -> None:
    """The last rank gets SIGUSR1 in this step (from 0) of the run in the folder of this name."""

    def run_step(run, step, stop):
        is_last = distributed.rank() == distributed.world_size() - 1
        if run.folder.name == domain and step == step_to_stop and is_last:
            os.kill(os.getpid(), signal.SIGUSR1)
        return ORIGINAL_RUN_STEP(run, step, stop)

    train.run_step = run_step


def perform(case, config, device):
    """What a case asks for; the result as JSON."""
    out = Path(case["out"])
    table = DomainTable(config.domains.names)
    if case["what"] == "train":
        return train.train_in_group(config, device)
    if case["what"] == "reference":
        reference = reference_by_training(config, out, device)
        return None if reference is None else reference.to_json(table)
    if case["what"] == "reference_from_model":
        return reference_from_model(config, case["model"], device).to_json(table)
    evaluation, folder = evaluate_in_group(config, case["model"], device)
    return {"folder": str(folder), "source": evaluation.model}


def main() -> None:
    setup_logging()
    device = start_process_group()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(case["config"], case["overrides"])
        out = Path(case["out"])
        out.mkdir(parents=True, exist_ok=True)
        if "stop_in" in case:
            stop_in(*case["stop_in"])
        outcome = {"error": None, "result": None}
        try:
            outcome["result"] = perform(case, config, device)
        except VersaTuneError as error:  # raised on all ranks alike: the group is still whole
            outcome["error"] = {"type": type(error).__name__, "text": str(error)}
        train.run_step = ORIGINAL_RUN_STEP
        (out / f"outcome_rank_{distributed.rank()}.json").write_text(json.dumps(outcome))
        distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
