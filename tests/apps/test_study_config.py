"""Study files: what is checked when they are read."""

import pytest
import yaml

from versatune_ds.apps.study.config import load_study
from versatune_ds.foundations.errors import ConfigError

STUDY = {
    "dir": "runs/x",
    "corpus": "sample",
    "seeds": [1, 2],
    "baselines": ["uniform"],
    "pretraining": {"mixture": {"law": 0.9, "code": 0.1}},
    "settings": {"domains": {"names": ["law", "code"]}, "train": {"max_steps": 4}},
    "arms": {"uniform": {"weights": {"strategy": "uniform"}}},
}

PRETRAINED = {"pretraining": None, "model": {"source": "x"}, "mixture": {"law": 0.5, "code": 0.5}}


def load(tmp_path, overrides=(), **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return load_study(path, list(overrides))


def test_a_pretrained_model_brings_a_mixture_of_its_own(tmp_path):
    study = load(tmp_path, **PRETRAINED)
    assert study.initial == PRETRAINED["mixture"] and study.model.source == "x"
    study = load(tmp_path, **PRETRAINED | {"mixture": "~/knowledge.json"})
    assert study.initial.name == "knowledge.json" and "~" not in str(study.initial)


def test_overrides_reach_arms(tmp_path):
    study = load(tmp_path, ["workers=3", "arms.uniform.weights.strategy=constant", "seeds=[5]"])
    assert study.workers == 3 and study.seeds == [5]
    assert study.arms["uniform"] == {"weights": {"strategy": "constant"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ["none"]}, "baselines: 'none' is no arm; arms: .'uniform'"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"tuning": {"seeds": [3], "arms": {}}}, "tuning: unknown key"),
        ({"arms": {"a/b": {}}, "baselines": ["a/b"]}, "arm 'a/b': use letters"),
        ({"expansions": [{"target": "law", "arms": ["x"]}]}, "expansions: 'x' is no arm"),
        ({"pretraining": {"mixture": {"law": 0.5, "math": 0.5}}}, r"mixture names \['law', 'math'\]"),
        ({"pretraining": {"mixture": {"law": 0.5, "code": 0.4}}}, "shares sum to 0.9"),
        ({"pretraining": None}, "source is not given: the study needs `pretraining`"),
        ({"model": {"source": "x"}}, "source is given: the study needs `mixture`, and only that of"),
        (PRETRAINED | {"mixture": {"law": 0.5, "math": 0.5}}, r"\n.*mixture names \['law', 'math'\]"),
        (PRETRAINED | {"model": {"source": "x", "vocab_size": 1024}}, "of a model that is made"),
        ({"objectives": {"o": {"law": 0.5, "code": 0.4}}}, "objectives.o: shares sum to 0.9"),
        ({"objectives": {"o": {"law": 1.0}}}, r"o names \['law'\], domains.names \['code', 'law'\]"),
        ({"worker": 2}, "worker: unknown key; did you mean workers"),
    ],
)
def test_mistakes_are_found_when_the_file_is_read(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)
