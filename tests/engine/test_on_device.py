"""The trainer on the device that is there: the same tests on a CPU, and under the mark `gpu` on CUDA.

    python -m pytest -m gpu tests/engine/test_on_device.py

On CUDA sums are not always added in the same order, so runs are compared by how far apart they are, in units
of what bf16 itself errs by or, in fp32, of a small share of the whole movement.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import device_steps
import numpy as np
import pytest
import step_cases as cases
import torch
from launched_runs import prepare_small_run
from launching import TRAIN_CASES, case_file, free_port, launch, rank_environment, read_jsonl
from safetensors.torch import load_file

from versatune_ds.engine.model import attention
from versatune_ds.engine.model.attention import BY_SAMPLE
from versatune_kernels import KernelError, linear_cross_entropy

HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_CUDA, reason="the device here is CUDA")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]
    ),
]
STEPS_FILE = Path(device_steps.__file__)
SABOTAGED = STEPS_FILE.with_name("sabotaged_train.py")
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
STEP_CASES = (
    "fp32", "fp32-onepack", "fp32-nan", "bf16", "bf16-onepack", "bf16-overlap", "bf16-recompute",
    "bf16-selective", "bf16-hosted", "bf16-moments", "bf16-stochastic",
)  # fmt: skip
ON_CUDA = ("bf16-compile", *(("bf16-liger", "bf16-liger-selective") if HAS_LIGER else ()))


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


def run_script(device: str, script: Path, arguments: list[str]) -> tuple[int, str]:
    """A script on one rank; its exit code and output. On CUDA not forked: a fork loses the driver."""
    if device == "cpu":
        (done,) = launch(script, 1, arguments)
        return done.returncode, done.stdout
    environment = rank_environment(0, 1, free_port())
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


# --- attention ----------------------------------------------------------------------------------------------


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=None):
    """torch's varlen kernel in plain PyTorch: [T, heads, d], causal when the window says so."""
    assert cu_q.dtype == torch.int32 and int(cu_q.diff().max()) == max_q and torch.equal(cu_q, cu_k)
    parts = []
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        segment = [tensor[begin:end].transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *segment, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=True
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (7, 1)])
def test_varlen_forward_and_backward_are_as_good_as_sdpa(device, heads, kv_heads, monkeypatch):
    """Against fp32 with a block-diagonal mask: samples of one token, grouped heads, padding at the end."""
    if device == "cpu":
        monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    lengths, size = [1, 7, 1, 130, 64, 1, 52], 64  # the last one is padding
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, total, size) for n in (heads, kv_heads, kv_heads)]
    values = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
    upstream = torch.randn(1, total, heads, size, generator=generator).to(device)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    mask = (owner[:, None] == owner[None, :]).tril()
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)

    def run(attend, dtype):
        leaves = [value.bfloat16().to(dtype).requires_grad_() for value in values]
        out = attend(*leaves)
        out.backward(upstream.bfloat16().to(out.dtype))
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    def sdpa(q, k, v):
        options = {"attn_mask": mask, "enable_gqa": heads != kv_heads}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    def varlen(q, k, v):
        options = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
        return attention.varlen_attention(torch.nn.Identity(), q, k, v, None, **options)[0]

    exact = run(sdpa, torch.float32)
    plain, ours = run(sdpa, torch.bfloat16), run(varlen, torch.bfloat16)
    for name, e, p, o in zip(("out", "dq", "dk", "dv"), exact, plain, ours, strict=True):
        assert (o - e).norm() <= 2 * (p - e).norm() + 1e-4 * e.norm(), name


# --- steps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=cases.VOCAB_SIZE, **shape, **more)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stepped(device, model, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What our steps leave, by case."""
    folder = tmp_path_factory.mktemp("steps")
    names = [*STEP_CASES, *(ON_CUDA if device == "cuda" else ())]
    code, output = run_script(device, STEPS_FILE, [str(folder), str(model), *names])
    assert code == 0, output[-4000:]
    return {name: load_file(folder / f"{name}.safetensors") for name in names}


@pytest.fixture(scope="module")
def plain(device, model) -> dict[str, dict[str, torch.Tensor]]:
    """The same steps in plain PyTorch: every sample alone, AdamW on fp32 weights.

    `exact` computes in fp32 from the weights in the file, `rounded` in fp32 from those rounded to bf16, and
    `bf16` on a bf16 copy of the fp32 weights.
    """
    return {
        "exact": plain_steps(model, device, torch.float32, torch.float32),
        "rounded": plain_steps(model, device, torch.bfloat16, torch.float32),
        "bf16": plain_steps(model, device, torch.bfloat16, torch.bfloat16),
    }


def plain_steps(folder: Path, device: str, start: torch.dtype, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=start).to(device=device, dtype=dtype)
    masters = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    options = {"lr": cases.LEARNING_RATE, "eps": cases.EPS, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(masters.values(), **options)
    out = {f"start.{name}": master.cpu().clone() for name, master in masters.items()}
    for step in range(device_steps.STEPS):
        sums = torch.zeros(2, 2, dtype=torch.float64)
        total = torch.zeros((), device=device)
        for i, domain in enumerate(cases.DOMAINS):
            tokens, mask = cases.Samples().sample(i)
            ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
            logits = model(ids.unsqueeze(0)).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            chosen = losses[torch.from_numpy(mask[1:]).to(device)]
            total = total + chosen.sum()
            sums[0, domain] += chosen.double().sum().item()
            sums[1, domain] += len(chosen)
        (total / sums[1].sum().item()).backward()
        for name, parameter in model.named_parameters():
            masters[name].grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name])
        out[f"sums.{step}"] = sums
    return out | {f"master.{name}": master.cpu() for name, master in masters.items()}


def movement(run: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights' way from their start, as one vector."""
    names = [name.removeprefix("start.") for name in start if name.startswith("start.")]
    return torch.cat([(run[f"master.{n}"] - start[f"start.{n}"]).flatten() for n in names])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Difference of two movements as a share of the second."""
    return float((a - b).norm() / b.norm())


def bf16_error(plain) -> float:
    """How far plain PyTorch in bf16 ends from where it would in fp32, as a share of the way."""
    rounded = plain["rounded"]
    error = apart(movement(plain["bf16"], rounded), movement(rounded, rounded))
    assert 0 < error < 0.1  # or the bound would say nothing
    return error


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fp32", "fp32-onepack", "fp32-nan"])
def test_five_zero3_steps_in_fp32_equal_plain_pytorch(case, stepped, plain):
    """With four accumulation steps as with one; a poisoned step in between leaves no trace."""
    ours, exact = stepped[case], plain["exact"]
    for step in range(device_steps.STEPS):
        torch.testing.assert_close(ours[f"sums.{step}"], exact[f"sums.{step}"], rtol=1e-4, atol=0)
    assert apart(movement(ours, exact), movement(exact, exact)) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in STEP_CASES if case.startswith("bf16") and "stoch" not in case] + list(ON_CUDA)
)
def test_five_zero3_steps_in_bf16_err_no_more_than_twice_as_far_as_plain_pytorch(case, stepped, plain):
    if case not in stepped:
        pytest.skip("for CUDA")
    ours, rounded = stepped[case], plain["rounded"]
    error = apart(movement(ours, rounded), movement(rounded, rounded))
    assert error <= 2 * bf16_error(plain)


@pytest.mark.slow
def test_bf16_master_weights_rounded_at_random_go_the_same_way(stepped, plain):
    """What is lost to rounding is noise around it: a weight's bf16 step is up to 0.8 % of the weight."""
    ours, rounded = stepped["bf16-stochastic"], plain["rounded"]
    assert 0 < apart(movement(ours, rounded), movement(rounded, rounded)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16-overlap", "bf16-recompute", "bf16-selective", "bf16-hosted"])
def test_the_same_computation_in_another_order_of_time_gives_the_same(case, device, stepped, plain):
    rounded = plain["rounded"]
    found = apart(movement(stepped[case], rounded), movement(stepped["bf16"], rounded))
    assert found == 0 if device == "cpu" else found <= bf16_error(plain)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return prepare_small_run(tmp_path_factory.mktemp("device_runs"))


@pytest.fixture(scope="module")
def runs(device, config) -> Path:
    """Folder with runs in bf16 under ZeRO-3, all in one process."""

    def case(name: str, sabotage: str | None = None, dump: tuple[int, ...] = (), *more: str) -> dict:
        overrides = [
            f"run.dir={config.parent / device / name}",
            "model.dtype=bf16",
            "train.max_steps=6",
            "checkpoint.export_at_end=true",
            "deepspeed={zero_optimization: {stage: 3}}",
            *more,
        ]
        return {"config": str(config), "overrides": overrides, "sabotage": sabotage, "dump": list(dump)}

    folder = config.parent / device
    folder.mkdir()
    every = [
        case("whole", dump=(6,)),
        case("stopped", "stop in step 3", (4,)),
        case("stopped", None, (4, 6)),
        case("poisoned", "nan in step 3"),
        case("no_memory", "no memory left in step 2"),
    ]
    code, output = run_script(device, TRAIN_CASES, case_file(folder, every))
    assert code == 0, output[-4000:]
    return folder


@pytest.mark.slow
def test_a_run_takes_the_attention_and_loss_of_its_device(runs, device):
    model = json.loads((runs / "whole" / "run.json").read_text())["model"]
    flash = importlib.util.find_spec("flash_attn") is not None
    on_cuda = "flash_attention_2" if flash else "versatune_varlen"
    assert model["dtype"] == "bf16" and model["attention"] == (BY_SAMPLE if device == "cpu" else on_cuda)
    losses = [line["loss"] for line in read_jsonl(runs / "whole" / "metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_goes_on_from_the_very_same_state(runs, device):
    trained, loaded = (
        load_file(runs / "stopped" / f"whole_4_{how}.safetensors") for how in ("trained", "loaded")
    )
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    ours, expected = (load_file(runs / name / "whole_6_trained.safetensors") for name in ("stopped", "whole"))
    if device == "cpu":
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    else:
        for name in (name for name in expected if name.startswith("fp32.")):
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-2, atol=1e-3)
    steps = [line["step"] for line in read_jsonl(runs / "stopped" / "metrics.jsonl")]
    assert steps == list(range(1, 7))


@pytest.mark.slow
def test_a_step_with_a_loss_that_is_not_finite_is_skipped(runs):
    metrics = read_jsonl(runs / "poisoned" / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["skipped"]] == [4]
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in metrics[4:])


@pytest.mark.slow
def test_out_of_memory_in_a_step_says_where_and_what_to_lower(runs):
    outcome = json.loads((runs / "no_memory" / "outcome_rank_0.json").read_text())
    assert outcome["type"] == "ConfigError"
    assert "out of memory in step 3, forward of pack 1 of 2 (peak" in outcome["text"]
    assert "batch.pack_len (now 192)" in outcome["text"]
    assert "activation_checkpointing: all" in outcome["text"]


@pytest.mark.slow
def test_the_exported_model_is_the_trained_one(runs, device):
    from transformers import AutoModelForCausalLM

    whole = load_file(runs / "whole" / "whole_6_trained.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(runs / "whole" / "model", dtype="auto").to(device)
    state = exported.state_dict()
    names = [name for name in whole if name.startswith("model.")]
    assert names
    for name in names:
        assert torch.equal(state[name.removeprefix("model.")].cpu(), whole[name]), name
    logits = exported(torch.arange(3, 20, device=device).unsqueeze(0)).logits
    assert logits.isfinite().all()


# --- bad labels ---------------------------------------------------------------------------------------------


def test_a_label_outside_of_the_vocabulary_is_named(device):
    hidden, weight = torch.randn(8, 16, device=device), torch.randn(50, 16, device=device)
    labels = torch.arange(8, device=device)
    labels[5] = 50
    with pytest.raises(KernelError, match="50"):
        linear_cross_entropy(hidden, weight, labels, validate=True)


@pytest.mark.slow
def test_a_run_with_a_bad_label_ends_with_a_text(device, config, tmp_path):
    """On CUDA the kernel ends the process's use of the device, at a later call; so a process of its own."""
    arguments = ["--config", str(config), f"run.dir={tmp_path / 'run'}", "train.max_steps=4"]
    code, output = run_script(device, SABOTAGED, ["bad label in step 2", *arguments])
    assert code != 0 and "versatune-ds: error: step 3, " in output
    assert "vocabulary" in output.partition("versatune-ds: error: ")[2]
