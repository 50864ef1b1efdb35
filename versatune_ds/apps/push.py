"""An exported model or adapter to the Hugging Face hub, with a model card from its run.

Only when asked for, and private unless said otherwise. Where to and as whom: HF_ENDPOINT and HF_TOKEN in the
environment, or `hf auth login`.

What is not covered: other hubs, and checkpoints.
"""

from __future__ import annotations

import os
from pathlib import Path

from versatune_ds.config.secrets import redacted
from versatune_ds.engine.checkpointing.export_target import add_file
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import SaveError, StateError
from versatune_ds.foundations.files import require_own
from versatune_ds.report.card import model_card
from versatune_ds.report.runs import read_run

CARD_FILE = "README.md"


def push(run_dir: Path, export: Path, repository: str, *, step: int | None, public: bool) -> str:
    """Write the card into the exported folder and upload all of it; returns the address of the commit.

    Args:
        repository: `owner/name`, made if it is not there.
        step: that was exported; None: the last one.
        public: of a repository that is made now.

    Raises:
        StateError: the folder holds no model, or a card of somebody else.
        SaveError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not any(export.glob("*.safetensors")):
        raise StateError(f"{export} holds no safetensors files; export the model first")
    is_adapter = (export / constants.ADAPTER_CONFIG_FILE).is_file()
    require_own(export, {CARD_FILE: "- versatune-ds\n"}, "write what you want to say on the hub")
    add_file(export, CARD_FILE, model_card(read_run(run_dir), step, is_adapter=is_adapter))
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    message = f"{run_dir.resolve().name}, trained with versatune_ds"
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=export, commit_message=message)
    except Exception as error:  # of the hub, of its HTTP client, of the names: many kinds, all said alike
        text = " ".join(redacted(str(error)).split())
        raise SaveError(
            f"{export} could not be pushed to {repository}: {text[:500]}; see HF_TOKEN (with the right to "
            "write) and the network. The folder is complete: the same command tries again"
        ) from None
    return str(commit.commit_url)
