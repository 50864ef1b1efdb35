"""One optimizer step is the same whatever it is spread over: ranks, accumulation, packs, ZeRO stages.

The reference is plain PyTorch: every sample alone in a row, summed token losses over their number, AdamW.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import step_cases as cases
import torch
from launching import launch_soundly
from safetensors.torch import load_file

CASES_FILE = Path(cases.__file__)

CASES = {
    1: [
        "untied-packed-zero0",
        "untied-packed-zero3",
        "untied-unpacked-zero1",
        "tied-packed-zero3-recompute",
        "tied-packed-zero0-triton",
        "untied-packed-zero2-triton-compile",
    ],
    2: [
        "untied-packed-zero3",
        "untied-unpacked-zero3",
        "tied-packed-zero3",
        "tied-packed-zero2",
        "untied-packed-zero3-triton",
        "tied-packed-zero3-triton-recompute",
        "untied-unpacked-zero1-triton-nan",
        "untied-packed-zero3-nan",
        "untied-packed-zero2-nan",
        "untied-packed-zero1-nan",
        "untied-packed-zero0-nan",
    ],
    4: ["untied-packed-zero3", "tied-unpacked-zero3-recompute", "untied-packed-zero1"],
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Two tiny models with saved weights: `untied` (Llama) and `tied` (Qwen2)."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    shape = {
        "vocab_size": cases.VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(folder / "untied")
    Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).save_pretrained(folder / "tied")
    return folder


@pytest.fixture(scope="session")
def results(models, tmp_path_factory):
    """`results(ranks)[case]`: what the ranks computed; each number of ranks is launched once."""

    @functools.cache
    def run(ranks: int) -> dict[str, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        launch_soundly(CASES_FILE, ranks, [str(folder), str(models), *CASES[ranks]])
        return {case: load_file(folder / f"{case}.safetensors") for case in CASES[ranks]}

    return run


@pytest.fixture(scope="session")
def reference(models):
    """`reference("tied")`: parameters and domain sums of the same two steps in plain PyTorch."""

    @functools.cache
    def run(name: str) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=cases.LEARNING_RATE, eps=cases.EPS, betas=(0.9, 0.95), weight_decay=0.0
        )
        out = {}
        for step in ("first", "second"):
            total, count = 0.0, 0
            sums = np.zeros((2, 2))
            for i, domain in enumerate(cases.DOMAINS):
                tokens, mask = cases.Samples().sample(i)
                ids = torch.tensor(tokens.astype(np.int64))
                logits = model(ids.unsqueeze(0)).logits[0]
                losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
                supervised = torch.from_numpy(mask[1:])
                total = total + losses[supervised].sum()
                count += int(supervised.sum())
                sums[:, domain] += float(losses[supervised].sum()), int(supervised.sum())
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            out[f"sums_{step}"] = torch.from_numpy(sums)
        for parameter_name, parameter in model.named_parameters():
            out[f"parameter.{parameter_name}"] = parameter.detach()
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(n, case) for n, names in CASES.items() for case in names])
def test_two_steps_equal_plain_pytorch(ranks, case, results, reference):
    """Same losses per domain and same parameters; the -nan cases skip a poisoned step in between."""
    ours, expected = results(ranks)[case], reference(case.split("-")[0])
    for step in ("first", "second"):
        # rows 0 and 1 of the buffer: loss sum and supervised tokens per domain
        np.testing.assert_allclose(ours[f"sums_{step}"][:2], expected[f"sums_{step}"], rtol=2e-5)
    names = {name for name in expected if name.startswith("parameter.")}
    assert names == {name for name in ours if name.startswith("parameter.")}
    for name in names:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.skipif(
    "VERSATUNE_TEST_OFFLOAD" not in os.environ,
    reason="DeepSpeed compiles its CPU Adam for minutes on first use; set VERSATUNE_TEST_OFFLOAD=1",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_discarded_step_leaves_nothing_in_an_offloaded_optimizer(stage, models, reference, tmp_path):
    case = f"untied-packed-zero{stage}-offload-nan"
    launch_soundly(CASES_FILE, 2, [str(tmp_path), str(models), case])
    ours, expected = load_file(tmp_path / f"{case}.safetensors"), reference("untied")
    for name in expected.keys() & ours.keys():
        if name.startswith("parameter."):
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_the_comparison_would_see_a_wrong_scale(models, reference):
    """A gradient that is too large by the number of ranks moves parameters further than the tolerance."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(models / "untied").state_dict()
    end = reference("untied")
    name = "lm_head.weight"
    step = end[f"parameter.{name}"] - start[name]
    doubled = start[name] + 2 * step
    with pytest.raises(AssertionError):
        torch.testing.assert_close(doubled, end[f"parameter.{name}"], rtol=1e-4, atol=2e-6)
