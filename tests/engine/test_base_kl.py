"""`model.kl_to_base` in whole runs: what it does, what is said of it, resumes, and refusals.

That its steps are those of plain PyTorch: `test_step.py`.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import step_cases as cases
import torch
import yaml
from launching import read_jsonl, run_cases
from plain_backend import plain_run
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.data.collate import collate, compare
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.engine.model.source import load_lm
from versatune_ds.engine.preflight.dry_run import dry_run
from versatune_ds.foundations.errors import ConfigError

ADAPTER = {"kind": "lora", "rank": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    file = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 2},
        optimizer={"lr": 0.02, "warmup_ratio": 0.0},
        train={"max_steps": 4},
        evaluation={"every_n_steps": 2, "max_samples_per_domain": 1},
        checkpoint={"every_n_steps": 1, "keep_last": 9, "export_at_end": False},
    )
    raw = yaml.safe_load(file.read_text())
    load_lm(load_config(file).model, seed=0).save_pretrained(raw["model"]["source"])
    raw["model"] |= {"adapter": ADAPTER, "weights": "pretrained"}
    file.write_text(yaml.safe_dump(raw))
    return file


def run(config, folder, kl, *more):
    return plain_run(config, f"run.dir={folder}", f"model.kl_to_base={kl}", *more)


STRONG, WEAK = "{coefficient: 100.0, share: 0.6}", "{coefficient: 1.0e-9, share: 0.6}"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("whole") / "run", STRONG)


@pytest.mark.parametrize("is_whole", [False, True], ids=["adapter", "all"])
def test_it_holds_the_model_near_its_base_and_is_told_by_domain(config, whole, tmp_path, is_whole):
    more = ["model.adapter=null", "optimizer.lr=0.003"] if is_whole else []
    weak = run(config, tmp_path / "weak", WEAK, *more)
    strong = run(config, tmp_path / "strong", STRONG, *more) if is_whole else whole
    held, free = (r.lines("metrics") for r in (strong, weak))
    assert held[0]["base_kl"] == pytest.approx(0, abs=1e-9)  # B is 0: the model is its base
    assert 0 < held[-1]["base_kl"] < 0.8 * free[-1]["base_kl"]
    for line in held[1:]:
        known = [kl for kl in line["domain_base_kl"].values() if kl is not None]
        assert known and min(known) <= line["base_kl"] <= max(known)
    assert held[-1]["loss"] > free[-1]["loss"]


def test_losses_that_are_shown_are_cross_entropies_and_none_is_compared_in_evaluations(
    config, whole, tmp_path
):
    plain = run(config, tmp_path / "plain", "null")
    first, without = whole.lines("metrics")[0], plain.lines("metrics")[0]
    assert first["domain_loss"] == without["domain_loss"] and without["base_kl"] is None
    assert whole.lines("eval")[0]["domain_loss"] == plain.lines("eval")[0]["domain_loss"]


def test_a_resumed_run_compares_what_the_whole_one_does(config, whole, tmp_path):
    cut_back(whole.folder, tmp_path / "resumed", 2)
    resumed = run(config, tmp_path / "resumed", "{coefficient: 100.0, share: 0.6}")
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())
    told = [[line["domain_base_kl"] for line in r.lines("metrics")] for r in (resumed, whole)]
    assert told[0] == told[1]


def test_the_model_is_whole_again_behind_the_base_and_a_rehearsal_leaves_nothing(whole):
    model = whole.backend.model
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    with model.base_kl.base(model.lm):
        assert all(layer.disable_adapters and not layer.training for layer in layers)
        assert not torch.is_grad_enabled()
    assert layers and not any(layer.disable_adapters or not layer.training for layer in layers)
    adapted = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.requires_grad for p in adapted)
    dry_run(whole.backend, whole.config)
    assert model.base_kl.take().kl.min() > 0  # all of the full pack was compared
    assert all(p.grad is None for p in adapted)


def test_a_base_that_is_a_copy_predicts_what_the_untrained_model_does(config, tmp_path):
    """After training all of the model, head included: by plain transformers, sample by sample."""
    trained = run(config, tmp_path / "all", WEAK, "model.adapter=null")
    before = load_lm(load_config(config).model, seed=0).eval()
    now = copy.deepcopy(before)
    now.load_state_dict(trained.parameters, strict=False)
    pack, sources = cases.packs(cases.PACKED)[1], [cases.Samples()] * 2
    batch = collate(pack, sources, cases.PACK_LEN, 0)
    model = trained.backend.model
    model(**model_inputs(compare(batch, pack, np.array([True, False, True]), sources, 0, 1.0), 1.0))
    expected = []
    for sample in (cases.PACKED[1][0], cases.PACKED[1][2]):
        tokens, mask = cases.Samples().sample(sample)
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        log_q, log_p = (lm(ids).logits[0, :-1].log_softmax(-1) for lm in (before, now))
        expected.append((log_q.exp() * (log_q - log_p)).sum(-1)[torch.from_numpy(mask[1:])])
    found = model.base_kl.take().kl
    assert found.min() > 0.001
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.adapter=null", "model.router=frozen"], "keeps frozen weights out of checkpoints"),
        (["model.neftune_alpha=5"], "would compare noise"),
        (["batch.sequence_parallel=2"], "the base sees whole samples"),
        (["model.kl_to_base={coefficient: 1.0, share: 0}"], "share"),
        (["model.kl_to_base={coefficient: 0}"], "coefficient"),
    ],
)
def test_what_it_cannot_do_is_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config, ["model.kl_to_base={coefficient: 1.0}", *overrides])


@pytest.mark.slow
def test_training_all_of_the_model_keeps_its_base_out_of_files_and_goes_on_anywhere(config, tmp_path):
    """Under ZeRO-3 on 2 ranks; from a checkpoint there bit for bit, and in stage 2."""

    def case(name, stage):
        zero = f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        settings = [f"run.dir={tmp_path / name}", zero, f"model.kl_to_base={STRONG}", "model.adapter=null"]
        settings += ["optimizer.lr=0.003", "checkpoint.export_at_end=true"]
        return {"config": str(config), "overrides": settings, "sabotage": None}

    run_cases(tmp_path, 2, [case("whole", 3)])
    for name in ("resumed", "elsewhere"):
        cut_back(tmp_path / "whole", tmp_path / name, 2)
    run_cases(tmp_path, 2, [case("resumed", 3), case("elsewhere", 2)])
    source = yaml.safe_load(config.read_text())["model"]["source"]
    names = load_file(f"{source}/model.safetensors").keys()
    runs = ("whole", "resumed", "elsewhere")
    models = {run: load_file(tmp_path / run / "model" / "model.safetensors") for run in runs}
    assert all(model.keys() == names for model in models.values())
    for name, tensor in models["whole"].items():
        assert torch.equal(models["resumed"][name], tensor)
        torch.testing.assert_close(models["elsewhere"][name], tensor, rtol=1e-4, atol=1e-5)
    told = [[m["base_kl"] for m in read_jsonl(tmp_path / run / "metrics.jsonl")] for run in runs]
    assert told[0][-1] > 0 and told[1] == told[0] and told[2] == pytest.approx(told[0], rel=1e-3, abs=1e-9)
    for path in (tmp_path / "whole" / "checkpoints").glob("*/*model_states.pt"):
        held = torch.load(path, weights_only=False)
        kept = {**held["module"], **(held["frozen_param_shapes"] or {})}
        assert not [name for name in kept if name.startswith("base.")], path
    assert main(["export", str(tmp_path / "whole"), "--step", "4", "--out", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in models["whole"].items())
