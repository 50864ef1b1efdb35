"""A step waits for the device where it must and nowhere else, as far as a CPU can show it."""

from __future__ import annotations

import json

import pytest
import step_cases
import torch
import wait_cases
from launching import REPOSITORY, launch_soundly

SCRIPT = REPOSITORY / "tests" / "support" / "wait_cases.py"


@pytest.mark.slow
def test_a_step_reads_the_norm_and_nothing_waits_in_a_pack(tmp_path):
    """What stays is listed in the docstring of `engine/train.py`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": step_cases.VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
    launch_soundly(SCRIPT, 1, [str(tmp_path / "waits.json"), str(tmp_path / "model")])
    found = json.loads((tmp_path / "waits.json").read_text())
    assert found == {"utils.py:is_invalid_grad_norm": wait_cases.STEPS}
