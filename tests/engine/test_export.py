"""`versatune-ds export`: what it writes, from which checkpoints, in how much memory, and what it refuses."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from export_memory import NoCompanions
from launching import REPOSITORY, rank_environment, run_cases
from prepared import byte_level_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_checkpoints import write_checkpoint
from small_runs import small_run
from tiny_families import family_model, image_text_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from versatune_ds.cli.main import main
from versatune_ds.config.model import Adapter, Model
from versatune_ds.engine.checkpointing.adapter_export import adapter_tensors, merged_tensors
from versatune_ds.engine.checkpointing.hf_export import Companions, ShardWriter, export_checkpoint
from versatune_ds.engine.model.adapters import PREFIX
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import SaveError, StateError
from versatune_ds.foundations.files import sha256_file

STEPS, RANKS = 2, 2


def zero(stage: int, **settings: object) -> str:
    """Override of the DeepSpeed configuration."""
    return "deepspeed=" + json.dumps({"zero_optimization": {"stage": stage, **settings}})


FP32_SUMS = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
ADAPTED = [
    "model.source={base}",
    "model.weights=pretrained",
    "model.adapter={rank: 4, alpha: 6}",
    "optimizer.lr=0.02",
]
RUNS = {
    # name: (overrides, sabotage)
    "stage_0": ([zero(0), "model.dtype=fp32"], None),
    "stage_1": ([zero(1), "model.dtype=fp32"], None),
    "stage_2": ([zero(2), "model.dtype=fp32"], None),
    "stage_3": ([zero(3, stage3_param_persistence_threshold=1500), "model.dtype=fp32"], None),
    "stage_1_bf16": ([zero(1)], None),
    "stage_2_bf16": ([zero(2)], None),
    "stage_3_bf16": ([zero(3, stage3_param_persistence_threshold=1500)], None),
    "stage_1_bf16_fp32_sums": ([f"deepspeed={json.dumps(FP32_SUMS)}"], None),
    "stage_2_bf16_offload": ([zero(2, offload_optimizer={"device": "cpu"})], None),
    "stage_2_round_robin": ([zero(2, round_robin_gradients=True)], None),
    "stage_3_subgroups": ([zero(3, sub_group_size=2000)], None),
    "stage_0_background": ([zero(0), "model.dtype=fp32", "checkpoint.asynchronous=true"], None),
    "stage_0_untied": ([zero(0), "model.dtype=fp32", "model.source={untied}"], None),
    "stage_2_untied": ([zero(2), "model.source={untied}"], None),
    "stage_3_untied": ([zero(3), "model.source={untied}"], None),
    "stage_1_frozen": ([zero(1)], "freeze two"),
    "stage_2_frozen": ([zero(2)], "freeze two"),
    "stage_3_frozen": ([zero(3)], "freeze two"),
    "stage_2_lora": ([zero(2), *ADAPTED], None),
    "stage_3_lora": ([zero(3), *ADAPTED, "model.dtype=fp32"], None),
    "stage_3_lora_moe": ([zero(3), *ADAPTED, "model.dtype=fp32", "model.source={moe}"], None),
    "stage_3_dora": ([zero(3), *ADAPTED, "model.dtype=fp32", "model.adapter.kind=dora"], None),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs: each has a checkpoint after its last step and the live export of the same weights."""
    folder = tmp_path_factory.mktemp("export")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 2},
        train={"max_steps": STEPS},
        optimizer={"lr": 2e-3},
        model={"dtype": "bf16"},
        checkpoint={"every_n_steps": STEPS, "export_shard_gb": 1e-4},
    )
    untied = folder / "untied"
    shutil.copytree(folder / "sample" / "model", untied)
    architecture = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**architecture, "tie_word_embeddings": False}))
    base = folder / "base"
    shutil.copytree(untied, base)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(untied)).save_pretrained(base)
    moe = folder / "moe"
    shutil.copytree(untied, moe)
    model = family_model("qwen3_moe", vocab_size=architecture["vocab_size"], max_position_embeddings=256)
    model.save_pretrained(moe)
    folders = {"{untied}": untied, "{base}": base, "{moe}": moe}
    cases = [
        {
            "config": str(config),
            "overrides": [
                f"run.dir={folder / name}",
                *(
                    functools.reduce(lambda o, f: o.replace(f[0], str(f[1])), folders.items(), o)
                    for o in overrides
                ),
            ],
            "sabotage": sabotage,
        }
        for name, (overrides, sabotage) in RUNS.items()
    ]
    run_cases(folder, RANKS, cases)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_gives_the_folder_that_the_run_itself_wrote(runs, name, capsys):
    """Byte for byte: every shard, the index, config, tokenizer and chat template."""
    run = runs / name
    assert json.loads((run / "outcome_rank_0.json").read_text()) is None
    assert main(["export", str(run)]) == 0
    target = run / f"model-step-{STEPS:08d}"
    assert capsys.readouterr().out == f"{target}\n"
    ours, expected = contents(target), contents(run / "model")
    assert ours.keys() == expected.keys()
    assert [file for file in expected if ours[file] != expected[file]] == []
    if "ora" in name:
        assert {"adapter_config.json", "adapter_model.safetensors"} < ours.keys()
        assert not {"config.json", "model.safetensors"} & ours.keys()
        return
    names = json.loads(ours["model.safetensors.index.json"])["weight_map"]
    assert ("lm_head.weight" in names) == ("untied" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage_3_lora", "stage_3_dora", "stage_3_lora_moe"])
def test_a_merged_model_computes_what_base_and_adapter_do(runs, name, capsys):
    """The adapter as peft loads it, trained away from 0, against the merged folder."""
    from peft import PeftModel

    run, merged = runs / name, runs / f"{name}_merged"
    assert main(["export", str(run), "--merge", "--out", str(merged)]) == 0
    source = runs / ("moe" if "moe" in name else "base")
    base = AutoModelForCausalLM.from_pretrained(source)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), run / "model")
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before, expected = base(ids).logits, adapted(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert json.loads((merged / "generation_config.json").read_text())["use_cache"]
    written, read = (
        {name for file in folder.glob("*.safetensors") for name in load_file(file)}
        for folder in (merged, source)
    )
    assert written == read  # of a mixture each expert by itself, as published
    capsys.readouterr()
    assert main(["export", str(runs / "stage_3"), "--merge", "--out", str(merged)]) == constants.EXIT_USAGE
    assert "this run trained the whole model" in capsys.readouterr().err


def test_only_the_files_that_transformers_loads_are_merged(tmp_path):
    """Mistral's folders hold the same weights once more, under other names."""
    lm = family_model("llama")
    lm.save_pretrained(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, tmp_path / "consolidated.safetensors")
    merged = dict(merged_tensors(Model(source=str(tmp_path), adapter=Adapter()), {}))
    assert merged.keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize(("kind", "method"), [("gemma3", "lora"), ("mistral3", "dora")])
def test_the_text_part_of_a_model_of_images_is_merged_alone(tmp_path, kind, method):
    """Its files name weights otherwise than the text model does, and hold a vision tower."""
    from peft import LoraConfig, get_peft_model

    wrapped = image_text_model(kind)
    wrapped.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_config(wrapped.config.text_config)
    text.model.load_state_dict(wrapped.model.language_model.state_dict())
    text.lm_head.load_state_dict(wrapped.lm_head.state_dict())
    settings = Model(source=str(tmp_path), adapter=Adapter(kind=method, rank=2, alpha=6.0))
    options = {"init_lora_weights": False, "use_dora": method == "dora", "target_modules": "all-linear"}
    adapted = get_peft_model(text, LoraConfig(r=2, lora_alpha=6.0, **options))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)  # no longer the rows' own lengths
    tensors = ((name.removeprefix(PREFIX), p.detach()) for name, p in adapted.named_parameters())
    ours = dict(merged_tensors(settings, dict(adapter_tensors(tensors))))
    expected = adapted.merge_and_unload().state_dict()
    assert ours.keys() | {"lm_head.weight"} == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
class TestWhatIsNotSound:
    """The verb on copies of a run; a manifest that fits shows that not only hashes protect."""

    @pytest.fixture()
    def run(self, runs, tmp_path) -> Path:
        ignored = shutil.ignore_patterns("model-step-*")
        return shutil.copytree(runs / "stage_2_bf16", tmp_path / "run", ignore=ignored)

    def check_refused(self, run: Path, capsys, text: str) -> None:
        assert main(["export", str(run), "--step", str(STEPS)]) == constants.EXIT_STATE
        assert text in capsys.readouterr().err
        assert not list(run.glob("*model-step*"))

    def test_a_damaged_file_is_named(self, run, capsys):
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"")
        self.check_refused(run, capsys, "mp_rank_00_model_states.pt has 0 bytes instead of")

    @pytest.mark.parametrize("manifest", ['{"files": ["a"]}', '{"files": {"a": 1}}', "[]", "{"])
    def test_another_manifest(self, run, capsys, manifest):
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        (checkpoint / "manifest.json").write_text(manifest)
        self.check_refused(run, capsys, "manifest.json cannot be read")

    def test_foreign_files(self, run, capsys):
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        foreign = checkpoint / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
        torch.save({"optimizer": {}}, foreign)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"][foreign.name] = {
            "bytes": foreign.stat().st_size,
            "sha256": sha256_file(foreign),
        }
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        self.check_refused(run, capsys, "use a checkpoint that this program wrote")


# --- without ranks ------------------------------------------------------------------------------------------

SHAPES = {
    "lm.a.weight": (7, 5),
    "lm.b.bias": (3,),
    "lm.c.weight": (11, 13),
    "lm.d.bias": (1,),
    "lm.e.weight": (2, 2, 2),
}


@pytest.fixture()
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def export(checkpoint: Path, out: Path, dtype: str = "fp32", max_shard_bytes: int = 400) -> None:
    export_checkpoint(checkpoint, LlamaConfig(), NoCompanions(), out, dtype, max_shard_bytes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sizes_that_do_not_divide(tmp_path, weights, stage, ranks):
    write_checkpoint(tmp_path / "step", weights, stage, ranks)
    for dtype, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        export(tmp_path / "step", tmp_path / dtype, dtype)
        found: dict[str, torch.Tensor] = {}
        for shard in sorted((tmp_path / dtype).glob("*.safetensors")):
            found |= load_file(shard)
        assert [
            f"lm.{name}" for name in found if not torch.equal(found[name], weights[f"lm.{name}"].to(wanted))
        ] == []
        assert {f"lm.{name}" for name in found} == set(weights)


def test_the_export_generates_with_a_cache(tmp_path, weights):
    """Which training has switched off."""
    write_checkpoint(tmp_path / "step", weights, stage=0, ranks=1)
    config = LlamaConfig(use_cache=False)
    export_checkpoint(tmp_path / "step", config, NoCompanions(), tmp_path / "model", "fp32", 400)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["use_cache"] is True


def test_generation_stops_where_turns_were_trained_to_end(tmp_path):
    """Not at the end-of-text token of a base model."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_tokenizer(specials, eos_token="<|endoftext|>")
    config = SimpleNamespace(
        model=SimpleNamespace(source=str(tmp_path), adapter=None),
        data=SimpleNamespace(chat_template="chatml"),
    )
    found = Companions.of(config, tokenizer, LlamaConfig(eos_token_id=0, use_cache=False)).generation
    assert found.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") != 0
    assert found.use_cache


def change(path: Path, edit) -> None:
    """Load a file of torch, edit it in place, and write it again."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def shard(folder: Path, rank: int) -> Path:
    return folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def empty_master(content) -> None:
    """As DeepSpeed saves weights that lie on NVMe."""
    content["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.empty(0)


def whole_master(content) -> None:
    """As with parameters that are divided among fewer ranks than there are."""
    flats = content["optimizer_state_dict"]["fp32_flat_groups"]
    flats[0] = torch.cat([flats[0]] * 2)


DAMAGE = {
    # name: (stage, what happens to the folder, what the error says)
    "truncated shard": (
        2,
        lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:2000]),
        "cannot be read",
    ),
    "empty shard": (3, lambda f: shard(f, 0).write_bytes(b""), "cannot be read"),
    "text": (1, lambda f: shard(f, 0).write_text("not a file of torch"), "cannot be read"),
    "model file missing": (0, lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "Restore it"),
    "shard missing": (2, lambda f: shard(f, 0).unlink(), r"ranks \[1\] found, 0 to 1 expected; restore"),
    "odd name": (
        2,
        lambda f: shard(f, 0).rename(f / "zero_pp_rank_x_mp_rank_00_optim_states.pt"),
        "use a ch",
    ),
    "other content": (2, lambda f: torch.save([1], shard(f, 0)), "use a checkpoint that this program wrote"),
    "other keys": (
        2,
        lambda f: change(shard(f, 1), lambda c: c["optimizer_state_dict"].pop("base_optimizer_state")),
        "KeyError: 'base_optimizer_state'",
    ),
    "other model": (0, lambda f: torch.save({}, f / "mp_rank_00_model_states.pt"), "KeyError"),
    "master weights elsewhere": (3, lambda f: change(shard(f, 1), empty_master), "export_at_end"),
    "divided otherwise": (3, lambda f: change(shard(f, 0), whole_master), "export_at_end"),
    "no state": (3, lambda f: (f / "versatune_state.json").unlink(), "versatune_state.json cannot be read"),
    "other state": (3, lambda f: (f / "versatune_state.json").write_text('{"version": 1}'), "world_size"),
    "newer state": (3, lambda f: (f / "versatune_state.json").write_text('{"version": 99}'), "version 99"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(tmp_path, weights, kind):
    stage, damage, text = DAMAGE[kind]
    write_checkpoint(tmp_path / "step", weights, stage, ranks=2)
    damage(tmp_path / "step")
    with pytest.raises(StateError, match=text):
        export(tmp_path / "step", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_parameter_without_all_its_elements_is_refused(tmp_path, weights):
    """Found only when its turn comes, with shards written already: they go."""
    write_checkpoint(tmp_path / "step", weights, stage=2, ranks=2)

    def shorten(content) -> None:
        masters = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        masters[0] = masters[0][:-3].clone()

    change(shard(tmp_path / "step", 1), shorten)
    with pytest.raises(StateError, match=r"parameter lm.e.weight has 5 of the 8 elements"):
        export(tmp_path / "step", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_full_disk_is_an_error_with_a_cure_and_leaves_the_older_export(tmp_path, weights, monkeypatch):
    write_checkpoint(tmp_path / "step", weights, stage=2, ranks=2)
    export(tmp_path / "step", tmp_path / "model")
    before = contents(tmp_path / "model")
    flush = ShardWriter._flush

    def full(self):
        if self._names:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(ShardWriter, "_flush", full)
    with pytest.raises(SaveError, match=r"No space left on device; see to that, or take another"):
        export(tmp_path / "step", tmp_path / "model")
    assert contents(tmp_path / "model") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "step"]


def test_what_no_export_wrote_is_not_replaced(tmp_path, weights, monkeypatch):
    """Found before a weight is read; its own files are replaced."""
    write_checkpoint(tmp_path / "step", weights, stage=2, ranks=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    export(tmp_path / "step", tmp_path / "model")
    export(tmp_path / "step", tmp_path / "model", "bf16")
    (tmp_path / "model" / "model.gguf").write_text("kept")
    monkeypatch.setattr(ShardWriter, "add", lambda *_: pytest.fail("a weight was read"))
    for name, file in (("notes", "mine.txt"), ("model", "model.gguf"), ("step", "versatune_state")):
        with pytest.raises(StateError, match=rf"holds files that no export of this program wrote \(.*{file}"):
            export(tmp_path / "step", tmp_path / name)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"
    assert (tmp_path / "model" / "model.gguf").read_text() == "kept"
    with pytest.raises(StateError, match="is no folder"):
        export(tmp_path / "step", tmp_path / "notes" / "mine.txt")


@pytest.fixture()
def large_shapes() -> dict[str, tuple[int, ...]]:
    """69 million parameters, the largest 6.3 million."""
    hidden, inner, vocab = 1536, 4096, 4096
    shapes: dict[str, tuple[int, ...]] = {"lm.model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(2):
        prefix = f"lm.model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    return {**shapes, "lm.model.norm.weight": (hidden,), "lm.lm_head.weight": (vocab, hidden)}


def test_memory_is_bounded_by_a_shard_and_a_parameter(tmp_path, large_shapes):
    """Of every stage: what the process allocates is far from the model's size, and the bytes are right."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in large_shapes.items()}
    whole = sum(weight.nbytes for weight in weights.values())
    largest = max(weight.nbytes for weight in weights.values())
    shard_bytes = whole // 10
    stages = (0, 2, 3)
    checkpoints = [tmp_path / f"stage-{stage}" for stage in stages]
    try:
        for stage, checkpoint in zip(stages, checkpoints, strict=True):
            write_checkpoint(checkpoint, weights, stage, ranks=2)
        finished = subprocess.run(
            [
                sys.executable,
                str(REPOSITORY / "tests" / "support" / "export_memory.py"),
                str(shard_bytes),
                str(tmp_path / "out"),
                *map(str, checkpoints),
            ],
            # glibc keeps up to 64 MB of what was freed, as the heap happens to lie; not so with this
            env={**rank_environment(0, 1, 0), "MALLOC_MMAP_THRESHOLD_": "1000000"},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
        assert [line["checkpoint"] for line in lines] == [path.name for path in checkpoints]
        for line in lines:
            assert line["peak"] - line["before"] < shard_bytes + 2 * largest < whole / 2, line
            for name in weights:
                assert_same(tmp_path / "out" / line["checkpoint"], name, weights[name])
    finally:
        for folder in (*checkpoints, tmp_path / "out"):
            shutil.rmtree(folder, ignore_errors=True)  # 1.7 GB


def assert_same(folder: Path, name: str, expected: torch.Tensor) -> None:
    plain = name.removeprefix("lm.")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[plain], "pt") as file:
        assert torch.equal(file.get_tensor(plain), expected), name
