"""Settings are read exactly, and mistakes are named with their place and cure."""

from __future__ import annotations

import shlex
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from versatune_ds.apps.study.config import Study
from versatune_ds.cli.main import build_parser
from versatune_ds.config.benchmarks import Benchmarks
from versatune_ds.config.derive import proxy_config, with_model
from versatune_ds.config.load import load_config, write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.foundations.errors import ConfigError

MINIMAL = """
run: {dir: runs/x}
model: {source: m}
data:
  train: [{path: a.jsonl, domain: law}, {path: b.jsonl, domain: code}]
domains: {names: [law, code]}
batch: {packs_per_step: 4}
train: {max_steps: 3}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_win_and_defaults_fill(file):
    config = load_config(file, ["optimizer.lr=3e-4", "weights.every_n_steps=7", "model.dtype=fp32"])
    assert config.optimizer.lr == 3e-4 and config.weights.every_n_steps == 7 and config.model.dtype == "fp32"
    assert config.batch.pack_len == 8192


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr_=1", "optimizer.lr_: unknown key; did you mean lr?"),
        ("optimzer.lr=1", "optimzer: unknown key; did you mean optimizer?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        ("data.train=[{pat: x, domain: law}]", "data.train.0.pat: unknown key; did you mean path?"),
        ("data.train=[{path: x}]", "give exactly one of `domain` and `domain_column`"),
        ("data.train=[{path: x, domain: lw}]", "data.train[0].domain is 'lw'"),
        ("batch.packs_per_step=many", "batch.packs_per_step: Input should be a valid integer"),
        ("domains.initial={law: 0.5, code: 0.6}", "shares sum to 1.1; they must sum to 1"),
        ("domains.initial={law: 1}", "missing domains ['code']"),
        ("weights.strategy=fostering", "give `reference`"),
        ("weights={strategy: expansion, reference: {law: 1, code: 1}}", "name it in `target`"),
        ("weights.strategy=expansion", "strategy expansion grows one domain: name it"),
        ("weights.strategy=manual", "follows `schedule`"),
        ("weights.reference={law: 0, code: 1}", "reference loss of law is 0.0"),
        ("weights.loss_source=probe", "give data.eval"),
        ("evaluation.every_n_steps=5", "give data.eval"),
        ("train.epochs=2", "exactly one of `max_steps` and `epochs`"),
        ("domains.min_weight=0.6", "min_weight 0.6 x 2 domains is more than 1"),
        ("domains.max_epochs={lw: 2}", "unknown domains ['lw']"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr", "write it as section.key=value"),
        ("batch.pack_len.x=3", "batch.pack_len"),
    ],
)
def test_mistakes_are_named(file, override, expected):
    text = MINIMAL.replace("batch: {", "batch: {pack_len: 64, ")
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert expected in str(error.value)


def test_all_mistakes_are_named_at_once(file):
    with pytest.raises(ConfigError) as error:
        load_config(file, ["optimizer.lr=-1", "batch.packs_per_step=0"])
    assert "2 problem(s)" in str(error.value)
    assert "optimizer.lr" in str(error.value) and "batch.packs_per_step" in str(error.value)


def test_yaml_traps_are_closed(file):
    config = load_config(file, ["run.dir=on", "metrics.wandb_project=no", "optimizer.eps=1e-9"])
    assert (
        str(config.run.dir) == "on" and config.metrics.wandb_project == "no" and config.optimizer.eps == 1e-9
    )
    file.write_text(MINIMAL + "train: {max_steps: 4}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:9: the key 'train' stands twice"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "expected"), [("", "nothing"), ("- 1", "a list"), ("a: [", "not valid YAML")]
)
def test_files_that_are_no_settings(file, text, expected):
    file.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(file)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_resolved_settings_read_back_equal(file, tmp_path):
    config = load_config(
        file, ["domains.initial={law: 0.25, code: 0.75}", "deepspeed={zero_optimization: {stage: 2}}"]
    )
    write_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    raw = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert raw["optimizer"]["betas"] == [0.9, 0.95]  # defaults are written too


@pytest.mark.parametrize(
    ("root", "nested"),
    [
        (
            Config,
            {
                "data.train.path",
                "weights.schedule.step",
                "detect.judge.endpoint.url",
                "reference.model.source",
            },
        ),
        (Study, {"pretraining.mixture", "expansions.target"}),
        (Benchmarks, {"tasks.metric"}),
    ],
)
def test_every_setting_is_documented(root, nested):
    """Each field of each section has a description, which `resolved.yaml` readers and docs rely on."""

    def sections(annotation):
        """Sections in an annotation such as `Weights`, `list[Source]` or `list[Weights] | Path | None`."""
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in get_args(annotation):
            yield from sections(argument)

    def fields(model, prefix=""):
        """(place, documented) of every field; a section that stands alone is documented by its class."""
        for name, field in model.model_fields.items():
            inner = list(sections(field.annotation))
            is_section = [field.annotation] == inner
            yield prefix + name, bool(inner[0].__doc__ if is_section else field.description)
            for section in inner:
                yield from fields(section, f"{prefix}{name}.")

    found = dict(fields(root))
    assert [place for place, documented in found.items() if not documented] == []
    assert nested <= found.keys()


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("model.source=https://me:canary@example.org/model", "model.source"),
        ("data.train=[{path: 'https://canary:canary@example.org/x', domain: law}]", "data.train[0].path"),
        ("model.tokenizer=hf_canarycanarycanarycanarycanarycanary", "model.tokenizer"),
        ("deepspeed={comet: {api_key: canary}}", "deepspeed.comet.api_key"),
        ("hf_token=canary", "hf_token"),
    ],
)
def test_secrets_in_settings_are_refused_and_not_repeated(file, override, place):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert place in str(caught.value) and "looks like a secret" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["data.chat_template=tokenizer", "model.tokenizer=./tokenizers/hf_token", "run.dir=/data/sk-1/user@host"],
)
def test_ordinary_settings_are_not_taken_for_secrets(file, override):
    load_config(file, [override])


PLACES = (
    *("run.dir", "model.source", "model.tokenizer", "data.cache_dir", "domains.initial", "weights.schedule"),
    *("weights.reference", "deepspeed", "detect.model", "detect.judge.model", "model.adapter.start_from"),
    *("reference.model.source", "reference.model.tokenizer"),
)


def test_home_and_variables_are_filled_in_wherever_a_path_stands(file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "scratch")
    config = load_config(file, [f"{place}=~/a/$SCRATCH/${{SCRATCH}}" for place in PLACES])
    for place in PLACES:
        value = config
        for part in place.split("."):
            value = getattr(value, part)
        assert str(value) == "/home/me/a/scratch/scratch", place
    write_resolved(config, tmp_path / "resolved.yaml")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert load_config(tmp_path / "resolved.yaml") == config
    adapters = load_config(file, ["model.adapter={start_from: {~/a: 1.0}}"]).model.adapter
    assert adapters is not None and adapters.start_from == {"/elsewhere/a": 1.0}
    (tmp_path / "$NAME").mkdir()
    assert load_config(file, [f"run.dir={tmp_path}/$NAME"]).run.dir == tmp_path / "$NAME"


@pytest.mark.parametrize(
    ("value", "problem"),
    [("$NOWHERE/x", "NOWHERE"), ("a/${NOWHERE}", "NOWHERE"), ("~nobody_here/x", "no user 'nobody_here'")],
)
def test_what_cannot_be_filled_in_is_an_error_and_no_folder_of_that_name(file, value, problem):
    for place in ("run.dir", "model.source", "weights.reference"):
        with pytest.raises(ConfigError, match=rf"{place}: .*{problem}"):
            load_config(file, [f"{place}={value}"])


def test_a_printed_command_reads_the_same_settings(file, tmp_path, monkeypatch):
    """Blanks, quotes and braces, as a shell takes words apart; and of settings that follow from these."""
    path = file.rename(tmp_path / "my settings.yaml")
    overrides = ["run.dir=my runs/it's", 'data.train=[{path: "a b.jsonl", domain: law}]', "train.max_steps=9"]
    config = load_config(path, overrides)
    for printed in (config.command("prepare"), with_model(config, "another").command("prepare")):
        program, verb, option, name, *words = shlex.split(printed)
        assert (program, verb, option) == ("versatune-ds", "prepare", "--config")
        assert load_config(name, words) == config


def test_places_in_arguments_are_filled_in(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PART", "part")
    args = build_parser().parse_args(["export", "~/run", "--out=~/$PART"])
    assert (str(args.run_dir), str(args.out)) == ("/home/me/run", "/home/me/part")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["evaluate", "--config", "c.yaml", "--model=$NOWHERE/m"])
    assert "the environment has no NOWHERE" in capsys.readouterr().err


BAD = [
    "evaluation.every_n_steps=5",  # there is no data.eval
    "weights.loss_source=probe",
    "weights.strategy=doremi",
    "weights.reference={law: -1.0, medicine: 2.0}",
    "weights.target=nobody",
    "domains.min_weight=0.9",
    "train.epochs=1",
]
WITHIN = ("reference loss of law is -1.0", "min_weight 0.9", "exactly one of `max_steps` and `epochs`")
BETWEEN = (
    *("evaluation.every_n_steps is set", "loss_source probe", "weights.target 'nobody'"),
    "weights.reference: missing domains ['code', 'law'], unknown domains ['medicine']",
)


def test_all_problems_are_told_at_once(file):
    """Within sections and between them, beside keys that are unknown and values of the wrong type."""
    sound = ["weights.reference={medicine: 2.0}", "domains.min_weight=0", "train.epochs=null"]
    types = ["optimizer.lr=fast", "batch.pack_length=3"]
    cases = (
        (BAD, (*WITHIN, "evaluation.every_n_steps is set")),
        ([*BAD, *sound], BETWEEN),
        ([*BAD, *sound, *types], (*BETWEEN, "optimizer.lr: ", "batch.pack_length: unknown key")),
    )
    for overrides, problems in cases:
        with pytest.raises(ConfigError) as error:
            load_config(file, overrides)
        assert [problem for problem in problems if problem not in str(error.value)] == []


def test_preparing_asks_only_for_what_it_needs(file, caplog, monkeypatch):
    monkeypatch.setattr("versatune_ds.config.load.log.propagate", True)
    config = load_config(file, BAD, to_train=False)
    assert config.evaluation.every_n_steps == 5 and config.command("prepare").endswith("train.epochs=1")
    assert "min_weight 0.9" in caplog.text and "`train` will refuse it" in caplog.text
    assert (
        proxy_config(load_config(file, [*BAD, "reference.model={source: p}"], to_train=False)).model.source
        == "p"
    )
    load_config(file, ["optimizer.states=bf16_stochastic", "model.dtype=fp32"], to_train=False)
    assert "bf16_stochastic needs model.dtype bf16" in caplog.text
    refused = {
        "data.train=[{path: a, domain: x}]": "domains.names has",
        "data.train=[{path: a}]": "exactly one of `domain` and `domain_column`",
        "optimizer.lr=fast": "optimizer.lr",
    }
    for override, problem in refused.items():
        with pytest.raises(ConfigError, match=problem):
            load_config(file, [*BAD, override], to_train=False)
