"""A checkpoint goes on on another number of ranks and in another ZeRO stage.

One uninterrupted run on 4 ranks under ZeRO-3 is the yardstick. Copies of it, cut back to a checkpoint, go on
on 2, 3 and 1 ranks and in other stages; one of those is stopped and goes on on 4 ranks again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from saved_checkpoints import write_checkpoint
from small_runs import cut_back, small_run

from versatune_ds.engine.backend.saved_shards import (
    MASTER,
    MOMENTS,
    SavedShards,
    cut,
    spans_of_stage3,
    spans_of_stages_1_and_2,
)

STEPS, CUT, STOP = 6, 2, 4
ZERO = {stage: f"deepspeed={{zero_optimization: {{stage: {stage}}}}}" for stage in (0, 1, 2)}
# parameters above the threshold are gathered when needed, smaller ones stay whole: there are both
ZERO[3] = "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 1500}}"
GROUPS = ZERO[3].replace("1500", "1500, sub_group_size: 2000")
ROUND_ROBIN = "deepspeed={zero_optimization: {stage: 2, round_robin_gradients: true}}"
OFFLOAD = "deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
FP32_SUMS = "deepspeed={zero_optimization: {stage: 1}, data_types: {grad_accum_dtype: fp32}}"
FROM_CUT = {
    # name: (ranks, ZeRO settings)
    "two_ranks": (2, ZERO[3]),
    "two_ranks_stage_2": (2, ZERO[2]),
    "three_ranks": (3, ZERO[3]),
    "one_rank_stage_1": (1, ZERO[1]),
    "one_rank_stage_3": (1, ZERO[3]),
    "two_ranks_offload": (2, OFFLOAD),
    "three_ranks_round_robin": (3, ROUND_ROBIN),
    "four_ranks_small_groups": (4, GROUPS),
}


# --- where elements lie: no DeepSpeed -----------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_stage3_spans_find_every_element(world_size):
    """Against shards written as ZeRO-3 does: each parameter cut into equal parts, padded, end to end."""
    shapes = [{"a": (3, 4), "b": (2,), "c": (1,)}, {"d": (7, 5)}]
    whole = {name: torch.randn(shape) for group in shapes for name, shape in group.items()}
    flat = [[[] for _ in shapes] for _ in range(world_size)]
    for group, members in enumerate(shapes):
        for name in members:
            part = -(-whole[name].numel() // world_size)
            padded = torch.nn.functional.pad(
                whole[name].flatten(), (0, part * world_size - whole[name].numel()), value=float("nan")
            )
            for rank in range(world_size):
                flat[rank][group].append(padded[rank * part : (rank + 1) * part])
    spans = spans_of_stage3(shapes, world_size)
    check_all_ranges(whole, spans, [[torch.cat(group) for group in rank] for rank in flat])


@pytest.mark.parametrize("paddings", [(0, 0, 0), (1, 2, 0)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 40])
def test_stage2_spans_find_every_element(world_size, paddings):
    """Against a flat group cut into equal parts without regard to parameters, with gaps between them."""
    whole = {name: torch.randn(numel) for name, numel in (("a", 11), ("b", 2), ("c", 17))}
    flat = torch.cat(
        [
            torch.nn.functional.pad(tensor, (0, padding), value=float("nan"))
            for tensor, padding in zip(whole.values(), paddings, strict=True)
        ]
    )
    part = -(-len(flat) // world_size)
    shards = [[flat[rank * part : (rank + 1) * part]] for rank in range(world_size)]
    sizes = [[len(group) for group in shard] for shard in shards]
    shapes = [{name: tensor.shape for name, tensor in whole.items()}]
    check_all_ranges(whole, spans_of_stages_1_and_2(shapes, sizes, [paddings]), shards)


def check_all_ranges(whole, spans, shards):
    assert spans.keys() == whole.keys()
    for name, tensor in whole.items():
        expected = tensor.flatten()
        for start in range(len(expected)):
            for stop in range(start, len(expected) + 1):
                found = [
                    shards[s.rank][s.group][s.offset : s.offset + s.numel]
                    for s in cut(spans[name], start, stop)
                ]
                assert torch.equal(torch.cat([torch.empty(0), *found]), expected[start:stop])


@pytest.mark.parametrize("stage", [2, 3])
def test_moments_are_not_the_weights(tmp_path, stage):
    """Read element by element from shards in which they are the weights plus 1 and plus 2."""
    weights = {"lm.a.weight": torch.randn(5, 3), "lm.b.bias": torch.randn(3)}
    write_checkpoint(tmp_path / "step", weights, stage, ranks=2)
    for path in (tmp_path / "step").glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        shard = content["optimizer_state_dict"]
        master = shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        inner = shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        for group, flat in enumerate(master):
            inner["state"][group] = {kind: flat + i for i, kind in enumerate(MOMENTS, start=1)}
        torch.save(content, path)
    saved = SavedShards(tmp_path / "step", 2)
    for name, weight in weights.items():
        for i, kind in enumerate((MASTER, *MOMENTS)):
            found = saved.read(name, kind, 1, weight.numel())
            assert torch.equal(found, weight.flatten()[1:] + i)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 12},
        train={"max_steps": STEPS},
        optimizer={"lr": 2e-3, "weight_decay": 0.1},
        weights={"every_n_steps": 3},
        checkpoint={"every_n_steps": 2, "keep_last": 100, "export_at_end": False},
    )

    def case(name: str, *overrides: str, sabotage: str | None = None, dump: tuple[int, ...] = ()) -> dict:
        settings = [f"run.dir={folder / name}", *overrides]
        return {"config": str(config), "overrides": settings, "sabotage": sabotage, "dump": list(dump)}

    run_cases(folder, 4, [case("whole", ZERO[3], dump=(CUT, STEPS)), case("stage_0", ZERO[0])])
    for name in FROM_CUT:
        cut_back(folder / "whole", folder / name, CUT)
    cut_back(folder / "stage_0", folder / "stage_0_one_rank", CUT)
    for ranks in (2, 3, 1, 4):
        cases = [
            case(name, zero, dump=(CUT,), sabotage="stop in step 3" if "stage_2" in name else None)
            for name, (wanted, zero) in FROM_CUT.items()
            if wanted == ranks
        ]
        if ranks == 1:
            cases.append(case("stage_0_one_rank", ZERO[0]))
        run_cases(folder, ranks, cases)
    run_cases(folder, 4, [case("two_ranks_stage_2", ZERO[3], dump=(STOP,))])
    shutil.copytree(folder / "whole", folder / "refused")
    cases = [
        case("refused", "model.dtype=bf16"),
        case("sums", "model.dtype=bf16", ZERO[3], sabotage="stop in step 3"),
        case("sums", "model.dtype=bf16", FP32_SUMS),
    ]
    run_cases(folder, 2, cases)
    return folder


@pytest.mark.parametrize("name", FROM_CUT)
class TestEveryChange:
    pytestmark = pytest.mark.slow

    def test_all_weights_and_moments_arrive_bit_for_bit(self, runs, name):
        saved = load_file(runs / "whole" / f"whole_{CUT}_trained.safetensors")
        loaded = load_file(runs / name / f"whole_{CUT}_loaded.safetensors")
        assert loaded.keys() == saved.keys()
        assert any(saved[key].abs().max() > 0 for key in saved if key.startswith(MOMENTS[1]))
        # with round robin DeepSpeed itself gathers fp32 weights and moments under wrong names; the model is
        # copied from those, and the next test shows what became of the moments
        keys = [key for key in saved if "round_robin" not in name or key.startswith("model.")]
        different = [key for key in keys if not torch.equal(loaded[key].flatten(), saved[key].flatten())]
        assert not different
        assert loaded["steps"].tolist() == [CUT] and loaded["decay"].tolist() == pytest.approx([0.1, 0])

    def test_the_run_goes_on_as_if_nothing_had_changed(self, runs, name):
        """Same batches; losses and domain weights to fp32 tolerance."""
        whole, run = (read_jsonl(runs / folder / "metrics.jsonl") for folder in ("whole", name))
        assert [line["step"] for line in run] == list(range(1, STEPS + 1))
        for ours, expected in zip(run, whole, strict=True):
            assert ours["domain_supervised_tokens"] == expected["domain_supervised_tokens"]
            assert ours["real_tokens"] == expected["real_tokens"]
            assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-5)
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-3)
            assert ours["weights"] == pytest.approx(expected["weights"], rel=2e-5)


@pytest.mark.slow
class TestRuns:
    def test_back_to_where_it_came_from(self, runs):
        """4 ranks stage 3 -> 2 ranks stage 2 -> 4 ranks stage 3: loaded once more, and the run is whole."""
        run = runs / "two_ranks_stage_2"
        assert (run / f"whole_{STOP}_loaded.safetensors").is_file()
        state = json.loads((run / "checkpoints" / f"step-{STOP:08d}" / "versatune_state.json").read_text())
        assert (state["world_size"], state["layout"]["ZeRO stage"]) == (2, 2)
        state = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "versatune_state.json").read_text())
        assert (state["world_size"], state["layout"]["ZeRO stage"]) == (4, 3)

    def test_stage_0_goes_on_on_one_rank(self, runs):
        whole, run = (read_jsonl(runs / name / "metrics.jsonl") for name in ("stage_0", "stage_0_one_rank"))
        assert [line["loss"] for line in run] == pytest.approx([line["loss"] for line in whole], rel=2e-5)

    def test_what_cannot_go_on_is_refused(self, runs):
        outcome = json.loads((runs / "refused" / "outcome_rank_1.json").read_text())
        assert outcome["type"] == "StateError"
        assert "model.dtype 'fp32'; this run has 'bf16'" in outcome["text"]
        outcome = json.loads((runs / "sums" / "outcome_rank_0.json").read_text())
        assert outcome["type"] == "StateError" and "(data_types.grad_accum_dtype)" in outcome["text"]

    def test_settings_are_what_the_test_says(self, runs):
        """The yardstick really had decay, sharding and moving weights."""
        settings = yaml.safe_load((runs / "whole" / "resolved.yaml").read_text())
        assert settings["optimizer"]["weight_decay"] == 0.1
        assert len(list((runs / "whole" / "checkpoints" / f"step-{CUT:08d}").glob("*optim_states.pt"))) == 4
        metrics = read_jsonl(runs / "whole" / "metrics.jsonl")
        assert metrics[0]["weights"] != metrics[-1]["weights"]
