"""NEFTune's noise on embeddings: how large, where, when, and from which seed (its steps: `test_step.py`)."""

from __future__ import annotations

import pytest
import torch
from plain_backend import plain_run
from small_runs import cut_back, small_run

from versatune_ds.config.load import load_config
from versatune_ds.engine.model.noise import EmbeddingNoise
from versatune_ds.foundations.errors import ConfigError

ALPHA, WIDTH, SEED = 5.0, 64, 3
SAMPLES = torch.tensor([0] * 4 + [1] * 400 + [-1] * 10, dtype=torch.int32)


@pytest.fixture
def embedding() -> torch.nn.Embedding:
    return torch.nn.Embedding(8, WIDTH)


@pytest.fixture
def noise(embedding) -> EmbeddingNoise:
    return EmbeddingNoise(embedding, ALPHA, SEED)


def drawn(embedding, noise, place=(0, 0, 0, 1)) -> torch.Tensor:
    """What is added to the embeddings of a pack."""
    ids = torch.zeros(1, len(SAMPLES), dtype=torch.int64)
    plain = embedding(ids)
    noise.prepare(SAMPLES, 2, place)
    return (embedding(ids) - plain)[0].detach()


def test_it_is_uniform_within_the_bound_of_each_sample_and_spares_padding(embedding, noise):
    added = drawn(embedding, noise)
    for number, length in ((0, 4), (1, 400)):
        mine, bound = added[number == SAMPLES], ALPHA / (length * WIDTH) ** 0.5
        assert 0.9 * bound < mine.abs().max() <= bound * (1 + 1e-4)
        assert mine.mean().abs() < 0.2 * bound
        assert mine.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not added[SAMPLES < 0].any()


def test_it_is_added_once_and_only_when_it_was_prepared(embedding, noise):
    drawn(embedding, noise)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert torch.equal(embedding(ids)[0, 0], embedding.weight[0])


def test_it_follows_from_seed_step_and_pack_and_not_from_the_ranks(embedding, noise):
    """The sixth pack of a step: on one rank, on two (dealt in reverse), and on three."""
    once, *others = (drawn(embedding, noise, (7, *rank)) for rank in ((5, 0, 1), (2, 1, 2), (1, 0, 3)))
    assert all(torch.allclose(once, other, atol=1e-6) for other in others)
    for place in ((8, 5, 0, 1), (7, 4, 0, 1)):
        assert not torch.allclose(once, drawn(embedding, noise, place), atol=1e-3)


def test_it_is_refused_where_ranks_share_a_pack(tmp_path):
    config = small_run(tmp_path, batch={"pack_len": 192, "packs_per_step": 2})
    with pytest.raises(ConfigError, match="neftune_alpha: noise is for whole packs"):
        load_config(config, ["model.neftune_alpha=5", "batch.sequence_parallel=2"])


def test_a_resumed_run_has_the_noise_of_the_whole_one_and_evaluations_have_none(tmp_path):
    config = small_run(
        tmp_path,
        batch={"pack_len": 192, "packs_per_step": 2},
        train={"max_steps": 3},
        evaluation={"every_n_steps": 3, "max_samples_per_domain": 1},
        checkpoint={"every_n_steps": 1, "keep_last": 9, "export_at_end": False},
    )

    def run(name: str, alpha: str):
        return plain_run(config, f"run.dir={tmp_path / name}", f"model.neftune_alpha={alpha}")

    whole, without = run("whole", "20"), run("without", "null")
    cut_back(whole.folder, tmp_path / "resumed", 1)
    resumed = run("resumed", "20")
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())
    first, plain = (r.lines("eval")[0]["domain_loss"] for r in (whole, without))
    assert first == plain
    losses = [[line["loss"] for line in r.lines("metrics")] for r in (whole, without)]
    assert all(noisy != quiet for noisy, quiet in zip(*losses, strict=True))
