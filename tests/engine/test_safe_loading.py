"""Files that would run code when they are opened: refused, and the code does not run."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from transformers import LlamaConfig, LlamaForCausalLM

from versatune_ds.config.model import Model
from versatune_ds.engine.backend.safe_loading import FORCE, tensors_only
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.packed_lm import build_model
from versatune_ds.foundations.errors import ConfigError, StateError

SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def torch_file(path, value):
    torch.save(value, path)


def old_torch_file(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [torch_file, old_torch_file, bare_pickle])
def test_code_in_a_file_does_not_run_even_where_a_caller_allows_it(tmp_path, write):
    fired = tmp_path / "fired"
    write(tmp_path / "file", {"module": torch.zeros(2), "more": Bomb(fired)})
    with pytest.raises(StateError, match="file holds more than tensors"), tensors_only(tmp_path / "file"):
        torch.load(tmp_path / "file", weights_only=False)  # as DeepSpeed does
    assert not fired.exists()
    assert FORCE not in os.environ
    if write is not bare_pickle:
        torch.load(tmp_path / "file", weights_only=False)
        assert fired.exists()  # without the guard it goes off: this test can fail


def test_what_deepspeed_stores_is_loaded(tmp_path):
    scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=1000,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        dtype=torch.float16,
    )
    torch.save({"loss_scaler": scaler, "stage": ZeroStageEnum(2), "x": torch.ones(3)}, tmp_path / "file")
    with tensors_only(tmp_path):
        loaded = torch.load(tmp_path / "file", weights_only=False)
    assert loaded["loss_scaler"].cur_scale == 2.0**16 and loaded["stage"] == 2


def test_the_callers_own_choice_comes_back(monkeypatch, tmp_path):
    monkeypatch.setenv(FORCE, "0")
    with tensors_only(tmp_path):
        assert os.environ[FORCE] == "1"
    assert os.environ[FORCE] == "0"


def test_a_model_folder_with_pickled_weights_is_refused(tmp_path):
    fired = tmp_path / "fired"
    model = LlamaForCausalLM(SHAPE)
    folder = tmp_path / "model"
    SHAPE.save_pretrained(folder)
    settings = Model(source=str(folder), dtype="fp32")
    for value in ({**model.state_dict(), "more": Bomb(fired)}, model.state_dict()):
        torch.save(value, folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match="safetensors"):
            build_model(settings, AttentionChoice("sdpa", "test"), seed=0)
        assert not fired.exists()
    (folder / "pytorch_model.bin").unlink()
    model.save_pretrained(folder)
    build_model(settings, AttentionChoice("sdpa", "test"), seed=0)
