"""One optimizer step is the same whatever it is spread over: ranks, accumulation, packs, ZeRO stages.

The reference is plain PyTorch: every sample alone in a row, summed token losses over their number, AdamW.
"""

from __future__ import annotations

import functools
import json
import shutil
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
        "untied-packed-zero2-offload-nan",  # DeepSpeed compiles its CPU Adam on first use
        "untied-packed-zero3-offload-nan",
        *(f"untied-packed-zero{stage}-clip" for stage in range(4)),
        *(f"lie-packed-zero{stage}" for stage in range(4)),
        "wrapped-packed-zero3",
    ],
    4: ["untied-packed-zero3", "tied-unpacked-zero3-recompute", "untied-packed-zero1"],
}


BF16_CASES = ["untied-packed-zero3-bf16", "tied-packed-zero1-bf16", "untied-packed-zero1-bf16-sums-nan"]
"""On 2 ranks. They have a comparison of their own."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Tiny models with saved weights: `untied` (Llama), `tied` (Qwen2), and two that are not what they say.

    `lie`: Llama whose configuration ties a head that the files hold; `wrapped`: Gemma 3 in a model of images,
    beside it `wrapped_alone`, the same as a text model.
    """
    from tiny_families import image_text_model
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

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
    lie = shutil.copytree(folder / "untied", folder / "lie") / "config.json"
    lie.write_text(json.dumps({**json.loads(lie.read_text()), "tie_word_embeddings": True}))
    wrapped = image_text_model("gemma3", vocab_size=cases.VOCAB_SIZE)
    wrapped.save_pretrained(folder / "wrapped")
    alone = AutoModelForCausalLM.from_config(wrapped.config.text_config)
    alone.model.load_state_dict(wrapped.model.language_model.state_dict())
    alone.save_pretrained(folder / "wrapped_alone")
    return folder


@pytest.fixture(scope="session")
def results(models, tmp_path_factory):
    """`results(ranks)[case]`: what the ranks computed; each number of ranks is launched once."""

    @functools.cache
    def run(ranks: int) -> dict[str, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        names = CASES[ranks] + (BF16_CASES if ranks == 2 else [])
        launch_soundly(CASES_FILE, ranks, [str(folder), str(models), *names])
        return {case: load_file(folder / f"{case}.safetensors") for case in names}

    return run


@pytest.fixture(scope="session")
def reference(models):
    """`reference("tied")`: parameters and domain sums of the same two steps in plain PyTorch."""

    @functools.cache
    def run(name, max_norm=0.0, start="fp32", compute="fp32") -> dict[str, torch.Tensor]:
        """The two steps.

        Args:
            max_norm: gradients are clipped to this global norm; 0: never.
            start: `bf16`: the weights are rounded to bf16 before the first step.
            compute: `bf16` (as `start`): forward and backward on a bf16 copy of the fp32 weights that AdamW
                moves.
        """
        from transformers import AutoModelForCausalLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[start]
        folder = models / f"{name}_alone" if name == "wrapped" else models / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.float() if compute == "fp32" else model
        masters = {key: parameter.detach().float() for key, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(
            masters.values(), lr=cases.LEARNING_RATE, eps=cases.EPS, betas=(0.9, 0.95), weight_decay=0.0
        )
        out = {f"start.{key}": master.clone() for key, master in masters.items()}
        for step in ("first", "second"):
            total, count = 0.0, 0
            sums, token_losses = np.zeros((2, 2)), []
            for i, domain in enumerate(cases.DOMAINS):
                tokens, mask = cases.Samples().sample(i)
                ids = torch.tensor(tokens.astype(np.int64))
                logits = model(ids.unsqueeze(0)).logits[0]
                losses = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
                supervised = torch.from_numpy(mask[1:])
                total = total + losses[supervised].sum()
                count += int(supervised.sum())
                sums[:, domain] += float(losses[supervised].sum()), int(supervised.sum())
                token_losses.append(losses[supervised].detach())
            (total / count).backward()
            for key, parameter in model.named_parameters():
                masters[key].grad = parameter.grad.float()
            out[f"norm_{step}"] = torch.nn.utils.get_total_norm([m.grad for m in masters.values()])
            if max_norm:
                torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)
            optimizer.param_groups[0]["lr"] = cases.RATES[step]
            optimizer.step()
            model.zero_grad()
            for key, parameter in model.named_parameters():
                parameter.data.copy_(masters[key])
            out[f"sums_{step}"] = torch.from_numpy(sums)
            out[f"losses_{step}"] = torch.cat(token_losses)
        return out | {f"parameter.{key}": master for key, master in masters.items()}

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(n, case) for n, names in CASES.items() for case in names])
def test_two_steps_equal_plain_pytorch(ranks, case, results, reference):
    """Same losses per domain and same parameters; the -nan cases skip a poisoned step in between."""
    max_norm = cases.MAX_NORM if "clip" in case else 0.0
    ours, expected = results(ranks)[case], reference(case.split("-")[0], max_norm)
    for step in ("first", "second"):
        assert expected[f"norm_{step}"] > 2 * max_norm  # clipping is no trifle
        # rows 0 and 1 of the buffer: loss sum and supervised tokens per domain
        np.testing.assert_allclose(ours[f"sums_{step}"][:2], expected[f"sums_{step}"], rtol=2e-5)
    names = {name for name in expected if name.startswith("parameter.")}
    assert names == {name for name in ours if name.startswith("parameter.")}
    for name in names:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_errs_no_more_than_twice_as_far_as_plain_pytorch_in_bf16(case, results, reference):
    """Against the same steps in fp32 from the same (rounded) weights; what moves are fp32 master weights."""
    ours, name = results(2)[case], case.split("-")[0]
    exact = reference(name, start="bf16")
    plain = reference(name, start="bf16", compute="bf16")
    for step in ("first", "second"):
        # what the losses of single tokens err by; in their sum errors may cancel, here or there
        error = float((plain[f"losses_{step}"] - exact[f"losses_{step}"]).abs().sum())
        difference = (ours[f"sums_{step}"][:2] - exact[f"sums_{step}"]).abs()
        assert difference[0].max() <= 2 * error
        assert not difference[1].any()
    names = [key.removeprefix("start.") for key in exact if key.startswith("start.")]

    def moved(weights: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        return torch.cat([(weights[f"{kind}.{n}"] - exact[f"start.{n}"]).flatten() for n in names])

    expected = moved(exact, "parameter")
    error = (moved(plain, "parameter") - expected).norm()
    assert 0 < error < 0.1 * expected.norm()  # or the bound would say nothing
    assert (moved(ours, "master") - expected).norm() <= 2 * error
    for n in names:  # the model computes with the rounded master weights
        assert torch.equal(ours[f"parameter.{n}"], ours[f"master.{n}"].bfloat16())


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
