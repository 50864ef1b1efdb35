"""One optimizer step is the same whatever it is spread over: ranks, accumulation, packs, ZeRO stages.

The reference is plain PyTorch: every sample alone in a row, summed token losses over their number, AdamW.
"""

from __future__ import annotations

import contextlib
import copy
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
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from versatune_ds.data.plan.balance import rank_packs
from versatune_ds.engine.model.adapters import PREFIX
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.foundations.files import canonical_hash

EXPERTS = 64
"""So many that no rank's tokens reach all of them."""
COMPILED_RECOMPUTE = tuple(map(int, torch.__version__.split(".")[:2])) >= preflight.COMPILED_RECOMPUTE
"""Older ones are refused (`preflight.check_compile`)."""
AUX = 0.3
"""Factor of the routers' balance loss of `experts`; large enough to be seen."""
CASES_FILE = Path(cases.__file__)
RECOMPUTED = {
    f"{model}-packed-zero{stage}": [f"{model}-packed-zero{stage}-{word}" for word in cases.RECOMPUTE]
    for model, stage in (("untied", 0), ("untied", 3), ("tied", 3), ("experts", 3))
}
"""On 2 ranks: without recomputation, and with each kind of it."""
LONG = [f"untied-packed-zero{stage}-long" for stage in (1, 2, 3)]
"""20 steps on 2 ranks, without overlap of communication; with `-overlap` behind it: with it."""

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
        "untied-packed-zero3-compile",
        *(["tied-packed-zero3-compile-recompute"] if COMPILED_RECOMPUTE else []),
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
        *(f"tied-packed-zero{stage}-lora" for stage in (0, 2)),
        "untied-unpacked-zero3-lora-recompute",
        "untied-packed-zero1-dora",
        "untied-packed-zero3-dora",
        "experts-packed-zero3-lora",
        *(f"tied-packed-zero{stage}-dft" for stage in (1, 2)),
        "untied-unpacked-zero3-dft-triton",
        "tied-packed-zero3-dft-lora-recompute",
        "experts-packed-zero3-dft-recompute",
        "untied-packed-zero2-dft-compile",
        "untied-packed-zero3-by2-dft",
        *(f"tied-packed-zero{stage}-lora-kl" for stage in (0, 1, 2)),
        "untied-packed-zero3-lora-kl",
        "untied-packed-zero3-lora-kl-selective",
        "untied-packed-zero3-dora-kl-recompute",
        "tied-packed-zero3-lora-kl-hosted",
        "experts-packed-zero3-lora-kl",
        *(f"tied-packed-zero{stage}-kl" for stage in (0, 1, 2)),
        "tied-packed-zero3-kl-recompute",
        "untied-packed-zero3-kl-nan",
        "untied-packed-zero2-kl-compile",
        "experts-packed-zero3-kl",
        *(f"tied-packed-zero{stage}-noise" for stage in (1, 2)),
        "untied-packed-zero3-noise-recompute",
        "untied-packed-zero3-noise-lora",
        "experts-packed-zero2-noise",
        "experts-packed-zero3-noise-lora-recompute",
        "untied-packed-zero2-noise-compile",
        *(f"tied-packed-zero{stage}-muon" for stage in (1, 2)),
        "untied-unpacked-zero3-muon",
        "untied-packed-zero3-muon-nan",
        "untied-packed-zero2-by2-muon",
        "longrope-packed-zero3",
        *(f"experts-packed-{how}" for how in ("zero2", "zero3", "zero3-recompute", "zero3-frozen")),
        *(f"untied-packed-zero{stage}-by2" for stage in range(4)),
        *(f"tied-unpacked-zero3-by2-{how}" for how in ("recompute", "selective", "hosted")),
        "untied-packed-zero2-by2-compile",
        "tied-packed-zero3-by2-lora",
        "untied-packed-zero3-by2-nan",
        "untied-packed-zero1-by2-clip",
        "longrope-packed-zero3-by2",
        "experts-packed-zero3-by2",
    ],
    4: [
        "untied-packed-zero3",
        "untied-packed-zero3-noise",
        "untied-packed-zero3-lora-kl",
        "untied-packed-zero3-kl",
        "tied-unpacked-zero3-recompute",
        "untied-packed-zero1",
        *(f"untied-packed-zero{stage}-by{n}" for stage in (1, 2, 3) for n in (2, 4)),
        "experts-packed-zero3-by2",
    ],
}


BF16_CASES = ["untied-packed-zero3-bf16", "tied-packed-zero1-bf16", "untied-packed-zero1-bf16-sums-nan"]
"""On 2 ranks. They have a comparison of their own."""

RECOMPUTING = [name for names in RECOMPUTED.values() for name in names]
ONLY_TWO = [*BF16_CASES, *RECOMPUTING, "untied-packed-zero0", *LONG, *(f"{case}-overlap" for case in LONG)]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Tiny models with saved weights: `untied` (Llama), `tied` (Qwen2), and others.

    Adapters by peft for the first three: `untied-lora` and so on. `experts`: Qwen3-MoE; `lie`: Llama whose
    configuration ties a head that the files hold; `longrope`: Phi 3, whose positions turn at 8 tokens;
    `wrapped`: Gemma 3 in a model of images, beside it `wrapped_alone`, the same as a text model.
    """
    from peft import LoraConfig, get_peft_model
    from tiny_families import family_model, image_text_model
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
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
    made = {
        "untied": lambda: LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)),
        "tied": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
    }
    settings = cases.ADAPTER
    for name, make in made.items():
        model = make()
        model.save_pretrained(folder / name)
        for kind in ("lora", "dora"):
            config = LoraConfig(
                r=settings["rank"],
                lora_alpha=settings["alpha"],
                target_modules=settings["targets"],
                use_dora=kind == "dora",
                init_lora_weights=False,  # B is not 0
                task_type="CAUSAL_LM",
            )
            get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / f"{name}-{kind}")
    experts = Qwen3MoeConfig(**shape, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=24)
    experts.router_aux_loss_coef = AUX
    model = Qwen3MoeForCausalLM(experts)
    model.save_pretrained(folder / "experts")
    attention = [f"{part}_proj" for part in "qkvo"]
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=attention, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "experts-lora")
    longrope = family_model("phi3, longrope", vocab_size=cases.VOCAB_SIZE, initializer_range=0.1)
    longrope.save_pretrained(folder / "longrope")
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
        names = CASES[ranks] + (ONLY_TWO if ranks == 2 else [])
        launch_soundly(CASES_FILE, ranks, [str(folder), str(models), *names])
        return {case: load_file(folder / f"{case}.safetensors") for case in names}

    return run


@pytest.fixture(scope="session")
def reference(models):
    """`reference("tied")`: parameters and domain sums of the same two steps in plain PyTorch and peft."""

    @functools.cache
    def run(
        name, max_norm=0.0, start="fp32", compute="fp32", adapter=None, frozen=False, objective=""
    ) -> dict[str, torch.Tensor]:
        """The two steps.

        Args:
            adapter: `lora`, `dora`: train that adapter.
            max_norm: gradients are clipped to this global norm; 0: never.
            start: `bf16`: the weights are rounded to bf16 before the first step.
            compute: `bf16` (as `start`): forward and backward on a bf16 copy of the fp32 weights that AdamW
                moves.
            frozen: routers do not train, and their loss is not added.
            objective: `dft`, or `noise` on the embeddings of `cases.PACKED`, or `muon` as the optimizer, or
                `kl` to the model without its adapter, or before training, on samples of `cases.PACKED`.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[start]
        folder = models / f"{name}_alone" if name == "wrapped" else models / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.float() if compute == "fp32" else model
        if adapter is not None:
            model = PeftModel.from_pretrained(model, models / f"{name}-{adapter}", is_trainable=True)
        base = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
        before, switched_off = model, getattr(model, "disable_adapter", contextlib.nullcontext)
        if objective == "kl" and adapter is None:
            before = copy.deepcopy(model).requires_grad_(False)
        masters = {key: p.detach().float() for key, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            masters.values(), lr=cases.LEARNING_RATE, eps=cases.EPS, betas=(0.9, 0.95), weight_decay=0.0
        )
        out = {f"start.{key}": master.clone() for key, master in masters.items()}
        embed = model.get_input_embeddings()
        momenta = {
            key: torch.zeros_like(master)
            for key, master in masters.items()
            if objective == "muon" and "proj" in key and master.dim() == 2
        }
        for step in ("first", "second"):
            total, count = 0.0, 0
            sums, token_losses = np.zeros((2, 2)), []
            kl_total, kl = 0.0, np.zeros((2, 2))
            routed: dict[int, tuple[torch.Tensor, ...]] = {}
            options = {"output_router_logits": True} if name == "experts" else {}
            for i, domain in enumerate(cases.DOMAINS):
                tokens, mask = cases.Samples().sample(i)
                ids = torch.tensor(tokens.astype(np.int64))
                vectors = embed(ids.unsqueeze(0))
                if objective == "noise":
                    vectors = vectors + noise_of(i, step, vectors.shape[-1])
                found = model(inputs_embeds=vectors, **options)
                logits, routed[i] = found.logits[0], found.get("router_logits")
                losses = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
                supervised = torch.from_numpy(mask[1:])
                trained = losses * (-losses.detach()).exp() if objective == "dft" else losses
                total = total + trained[supervised].sum()
                count += int(supervised.sum())
                sums[:, domain] += float(losses[supervised].sum()), int(supervised.sum())
                token_losses.append(losses[supervised].detach())
                if objective == "kl" and i in compared_in(step):
                    with torch.no_grad(), switched_off():
                        base_logits = before(ids.unsqueeze(0)).logits[0]
                    log_p, log_q = (x[:-1][supervised].log_softmax(-1) for x in (logits, base_logits))
                    of_sample = (log_q.exp() * (log_q - log_p)).sum()
                    kl_total = kl_total + of_sample
                    kl[:, domain] += float(of_sample), int(supervised.sum())
            loss = total / count
            if objective == "kl":
                loss = loss + cases.KL["coefficient"] * kl_total / kl[1].sum()
                out[f"kl_{step}"] = torch.from_numpy(kl)
            if options:  # routers are balanced within a pack
                balance = torch.zeros(())
                out[f"load_{step}"] = torch.zeros(len(cases.PACKED), 2, EXPERTS)
                for number, pack in enumerate(cases.PACKED):
                    layers = tuple(
                        torch.cat(of_samples) for of_samples in zip(*map(routed.get, pack), strict=True)
                    )
                    balance = balance + load_balancing_loss_func(layers, EXPERTS, 2)
                    for layer, of_layer in enumerate(layers):
                        chosen = of_layer.topk(2).indices.flatten()
                        out[f"load_{step}"][number, layer] = torch.bincount(chosen, minlength=EXPERTS)
                out[f"balance_{step}"] = balance.detach()
                loss = loss if frozen else loss + AUX * balance / len(cases.PACKED)
            loss.backward()
            parameters = dict(model.named_parameters())
            for key in masters:
                if not (frozen and key.endswith(".mlp.gate.weight")):
                    masters[key].grad = parameters[key].grad.float()
            gradients = [m.grad for m in masters.values() if m.grad is not None]
            out[f"norm_{step}"] = torch.nn.utils.get_total_norm(gradients)
            if max_norm:
                torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)
            optimizer.param_groups[0]["lr"] = cases.RATES[step]
            for key, momentum in momenta.items():
                muon_step(masters[key], momentum, cases.MUON_FACTOR * cases.RATES[step])
            optimizer.step()
            model.zero_grad()
            for key, master in masters.items():
                parameters[key].data.copy_(master)
            out[f"sums_{step}"] = torch.from_numpy(sums)
            out[f"losses_{step}"] = torch.cat(token_losses)
        end = {**masters, **base}
        return out | {f"parameter.{key.removeprefix(PREFIX)}": value for key, value in end.items()}

    return run


def compared_in(step: str) -> set[int]:
    """Samples that are compared with the base: of those in `PACKED`, in its order, every second one."""
    order = [i for pack in cases.PACKED for i in pack]
    u = int(canonical_hash(["kl_to_base", 0, cases.STEPS.index(step)])[:5], 16) / 2**20
    return set(order[0 if u >= 0.5 else 1 :: 2])


def muon_step(master: torch.Tensor, momentum: torch.Tensor, rate: float) -> None:
    """Keller Jordan's step of a matrix in fp32; takes its gradient away from AdamW."""
    gradient, master.grad = master.grad, None
    momentum.lerp_(gradient, 0.05)
    x = gradient.lerp(momentum, 0.95)
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    master.sub_(rate * max(1.0, master.shape[0] / master.shape[1]) ** 0.5 * x)


def noise_of(sample: int, step: str, width: int) -> torch.Tensor:
    """NEFTune's for a sample of `PACKED`: +-alpha / sqrt(L d), drawn for its pack."""
    number, pack = next((n, pack) for n, pack in enumerate(cases.PACKED) if sample in pack)
    seed = int(canonical_hash([0, cases.STEPS.index(step), number])[:15], 16)
    drawn = torch.empty(1, cases.PACK_LEN, width).uniform_(
        -1, 1, generator=torch.Generator().manual_seed(seed)
    )
    length, at = cases.LENGTHS[sample], sum(cases.LENGTHS[i] for i in pack[: pack.index(sample)])
    return cases.ALPHA / (length * width) ** 0.5 * drawn[:, at : at + length]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(n, case) for n, names in CASES.items() for case in names])
def test_two_steps_equal_plain_pytorch(ranks, case, results, reference):
    """Same losses per domain and same parameters; the -nan cases skip a poisoned step in between."""
    max_norm = cases.MAX_NORM if "clip" in case else 0.0
    adapter = next((word for word in case.split("-") if word in ("lora", "dora")), None)
    ours = results(ranks)[case]
    frozen = "frozen" in case or adapter is not None
    objective = next((word for word in case.split("-") if word in ("dft", "noise", "muon", "kl")), "")
    model = case.split("-")[0]
    expected = reference(model, max_norm, adapter=adapter, frozen=frozen, objective=objective)
    for step in ("first", "second"):
        assert expected[f"norm_{step}"] > 2 * max_norm  # clipping is no trifle
        # rows 0 and 1 of the buffer: loss sum and supervised tokens per domain
        np.testing.assert_allclose(ours[f"sums_{step}"][:2], expected[f"sums_{step}"], rtol=2e-5)
        if objective == "kl":
            np.testing.assert_allclose(ours[f"kl_{step}"], expected[f"kl_{step}"], rtol=1e-4, atol=1e-5)
            # without an adapter the model still is its base in the first step
            is_apart = step == "second" or adapter is not None
            assert ((expected[f"kl_{step}"][0] / expected[f"kl_{step}"][1]).min() > 0.01) == is_apart
    names = {name for name in expected if name.startswith("parameter.")}
    assert names == {name for name in ours if name.startswith("parameter.")}
    atol = 1e-4 if objective == "muon" else 2e-6  # five steps of Newton-Schulz, of steps of 0.05
    if objective:
        plain = reference(model, max_norm, adapter=adapter, frozen=frozen)
        assert max((plain[name] - expected[name]).abs().max() for name in names) > 1e-3
    for name in names:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
        if adapter and "lora_" not in name:
            assert torch.equal(ours[name], expected[name]), f"{name} is frozen"
    if case.startswith("experts"):
        check_routers(ours, expected, ranks // (2 if "by2" in case else 1))


def check_routers(ours, expected, groups) -> None:
    """Their loss and loads; tokens of each group of ranks reach experts that no other group's do."""
    for step in ("first", "second"):
        assert ours[f"routers_{step}"][0] == pytest.approx(float(expected[f"balance_{step}"]), rel=1e-5)
        load = expected[f"load_{step}"]
        assert torch.equal(ours[f"routers_{step}"][1:], load.sum(0).flatten().double())
        packs = cases.packs(cases.PACKED)
        mine = [{tuple(p.samples) for p in rank_packs(packs, rank, groups)} for rank in range(groups)]
        reached = [
            {
                (layer, e)
                for n, p in enumerate(packs)
                if tuple(p.samples) in of_rank
                for layer, e in load[n].nonzero().tolist()
            }
            for of_rank in mine
        ]
        assert all(own - other for own in reached for other in reached if own is not other)


@pytest.mark.slow
@pytest.mark.parametrize("case", RECOMPUTING)
def test_recomputation_changes_no_bit(case, results):
    """Two steps: losses, and parameters, which are start and gradients."""
    plain = next(plain for plain, names in RECOMPUTED.items() if case in names)
    expected, found = results(2)[plain], results(2)[case]
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_overlapping_communication_changes_no_loss_and_no_parameter(case, results):
    """Buckets smaller than a layer are filled and sent many times a step, two packs a rank and step."""
    plain, overlapping = results(2)[case], results(2)[f"{case}-overlap"]
    assert plain.keys() == overlapping.keys() and len([key for key in plain if "sums" in key]) == 20
    assert plain["sums_19"][0].sum() < 0.8 * plain["sums_00"][0].sum()  # it learns
    for key, expected in plain.items():
        torch.testing.assert_close(overlapping[key], expected, rtol=1e-6, atol=1e-7)


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
