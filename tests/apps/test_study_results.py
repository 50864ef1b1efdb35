"""Numbers of a study by hand, and its tables."""

import json
import math

import numpy as np
import pytest

from versatune_ds.apps.study.results import (
    RunResult,
    arm_summary,
    changes,
    expansion_summary,
    interval,
    last_evaluation,
    read_result,
    reference_losses,
    score_summary,
    summarise,
    weight_summary,
)
from versatune_ds.apps.study.tables import score_tables, study_tables
from versatune_ds.foundations.errors import StateError
from versatune_ds.report.measures import MINUS, NOTHING

NAMES = ["law", "code"]


def update(step, after, **more):
    return {"gate_open": None, "step": step, "after": dict(zip(NAMES, after, strict=True)), **more}


def run(arm, seed, after, *, before=(4.0, 2.0), updates=None):
    return RunResult(
        arm=arm,
        seed=seed,
        before=dict(zip(NAMES, before, strict=True)),
        after=dict(zip(NAMES, after, strict=True)),
        lowest=dict(zip(NAMES, after, strict=True)),
        token_shares={"law": 0.25, "code": 0.75},
        tokens=1000 + seed,
        updates=updates or [update(0, (0.5, 0.5))],
    )


def test_changes_by_hand():
    # law 4 -> 3: -25 %; code 2 -> 2.2: +10 %
    assert changes(run("a", 1, (3.0, 2.2)), NAMES) == pytest.approx([-0.25, 0.1])
    runs = {1: run("a", 1, (3.0, 2.2))}
    assert arm_summary(runs, {}, NAMES, {})["mean_change"]["mean"] == pytest.approx(-0.075)


def test_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(2) = 4.303, half width 4.303 / sqrt(3)
    found = interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["half_width"]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    # five values, as in the study: t(4) = 2.776
    five = interval([0.0, 0.0, 0.0, 0.0, 5.0])
    assert five["half_width"] == pytest.approx(2.776445 * math.sqrt(5.0) / math.sqrt(5))
    assert interval([1.5])["half_width"] is None
    many = interval(np.arange(100.0))["half_width"]
    assert many == pytest.approx(1.984217 * np.arange(100).std(ddof=1) / 10)


def test_differences_are_taken_seed_by_seed():
    # seeds differ a lot, but the arm is 1 % of 4 nats better on law with each: no spread is left
    arms = [run("uniform", s, (3.0 + s / 10, 2.0)) for s in (1, 2, 3)]
    arms += [run("better", s, (2.96 + s / 10, 2.0)) for s in (3, 1, 2)]
    summary = summarise(
        reference={"law": 2.0, "code": 1.5},
        arms=arms,
        names=NAMES,
        baselines=["uniform"],
        expansions=[],
        objectives={"even nats": {"law": 0.5, "code": 0.5}, "code alone": {"law": 0.0, "code": 1.0}},
    )
    better = summary["arms"]["better"]
    against = better["against"]["uniform"]
    assert against["mean_change"]["mean"] == pytest.approx(-0.005)  # -1 % on one of two domains
    assert against["mean_change"]["half_width"] == pytest.approx(0.0, abs=1e-12)
    assert against["domain_change"]["law"]["mean"] == pytest.approx(-0.01)
    assert better["mean_change"]["half_width"] > 0.01
    assert better["seeds"] == [1, 2, 3]
    # (2.96 + s / 10 + 2) / (4 + 2) - 1, s = 1, 2, 3; 0.04 nats of 6 below uniform
    assert better["objectives"]["even nats"]["mean"] == pytest.approx(5.16 / 6 - 1)
    apart = against["objectives"]["even nats"]
    assert (apart["mean"], apart["half_width"]) == pytest.approx((-0.04 / 6, 0.0), abs=1e-12)
    assert better["objectives"]["code alone"]["mean"] == 0.0  # 2.0 before and after


def test_expansion_by_hand():
    # target law: -25 %; code +10 % in one seed, -5 % in the other: mean +2.5 %, forgetting (10 + 0) / 2
    runs = {1: run("x", 1, (3.0, 2.2)), 2: run("x", 2, (3.0, 1.9))}
    found = expansion_summary(runs, "law", NAMES)
    assert found["target_change"]["mean"] == pytest.approx(-0.25)
    assert found["others_change"]["mean"] == pytest.approx(0.025)
    assert found["forgetting"]["mean"] == pytest.approx(0.05)
    assert found["target_share"] == 0.25


def test_weight_summary_by_hand():
    updates = [
        update(0, (0.5, 0.5)),
        update(5, (0.6, 0.4), gate_open=True),
        update(10, (0.8, 0.2), gate_open=False),
    ]
    still = [update(0, (0.5, 0.5)), update(5, (0.5, 0.5))]
    found = weight_summary([run("a", 1, (3.0, 2.0), updates=updates)], NAMES)
    assert found["moved"] == pytest.approx(0.3)  # half of 0.3 + 0.3
    assert found["gate_open"] == 0.5 and found["final"] == pytest.approx({"law": 0.8, "code": 0.2})
    both = weight_summary([run("a", s, (3.0, 2.0), updates=u) for s, u in ((1, updates), (2, still))], NAMES)
    assert both["moved"] == pytest.approx(0.15)
    assert both["initial"] == {"law": 0.5, "code": 0.5} and both["final"]["law"] == pytest.approx(0.65)


def test_reference_losses_are_the_lowest_of_each_domain_s_own_run():
    runs = [run("law", 0, (1.5, 9.0)), run("code", 0, (9.0, 1.25))]
    assert reference_losses(runs) == {"law": 1.5, "code": 1.25}


def write_run(folder, steps):
    folder.mkdir()
    lines = [
        {
            "step": step,
            "domain_loss": {"law": 4.0 - loss, "code": 2.0, "replay": None},
            "domain_score": {"law": loss},
        }
        for step, loss in zip(*steps, strict=True)
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"real_tokens": 7, "cumulative_shares": {"tokens": {"law": 0.5, "code": 0.5}}}
    (folder / "metrics.jsonl").write_text(2 * (json.dumps(metrics) + "\n"))
    (folder / "weights.jsonl").write_text(json.dumps(update(0, (0.5, 0.5))) + "\n")


def test_a_run_is_read_back_less_what_was_not_evaluated(tmp_path):
    write_run(tmp_path / "run", ((0, 2, 4), (0.0, 1.0, 0.5)))
    found = read_result(tmp_path / "run", "a", 1, 4)
    assert found.before["law"] == 4.0 and found.after["law"] == 3.5 and found.lowest["law"] == 3.0
    assert last_evaluation(tmp_path / "run") == (4, 2.75)
    assert found.tokens == 14 and found.scores_before == {"law": 0.0} and found.scores_after == {"law": 0.5}


@pytest.mark.parametrize("steps", [((0, 2), (0.0, 1.0)), ((4,), (0.0,)), ((), ())])
def test_an_unfinished_run_is_refused(tmp_path, steps):
    write_run(tmp_path / "run", steps)
    with pytest.raises(StateError, match=r"expected 0 \.\. 4"):
        read_result(tmp_path / "run", "a", 1, 4)


def test_the_tables_have_every_arm_and_every_number():
    moved = [update(0, (0.5, 0.5)), update(5, (0.9, 0.1))]
    arms = [
        run(arm, s, (3.0, 1.9 + s / 10), updates=moved)
        for s in (1, 2)
        for arm in ("uniform", "x<y", "law_only")
    ]
    summary = summarise(
        reference={"law": 2.0, "code": 1.5},
        arms=arms,
        names=NAMES,
        baselines=["uniform"],
        expansions=[("law", ["law_only"])],
        objectives={"mostly code": {"law": 0.25, "code": 0.75}},
    )
    summary["provenance"] = {
        "date": "2026-01-01", "config": "x.yaml", "commits": ["abc"], "versions": {"torch": "1"},
        "hardware": {"device": "CPU", "cpu_count": 2}, "num_parameters": 1000, "workers": 1, "runs": 9,
        "run_s": 60.0, "cpu_s": 50.0, "wall_s": 30.0,
        "study": {
            "model": {"dtype": "fp32"},
            "pretraining": {"settings": {}, "mixture": {"law": 0.9, "code": 0.1}},
            "settings": {"train": {"max_steps": 5}, "weights": {"every_n_steps": 5}},
            "objectives": {"mostly code": {"law": 0.25, "code": 0.75}},
        },
    }  # fmt: skip
    text = study_tables(summary)
    assert "| x<y |" in text and "| law_only |" in text and "pre-trained on law 90 %, code 10 %" in text
    # code +0 % and +5 %, law -25 %: -12.5 % and -10 %; weights 0.5 to 0.9
    assert f"| uniform | {MINUS}11.25 ± 15.88 % | {NOTHING} | 40.0 % | {MINUS}25.0 ± 0.0 % |" in text
    assert f"| x<y | {MINUS}11.25 ± 15.88 % | +0.00 ± 0.00 | 40.0 % |" in text
    assert text.count("| x<y |") == 3 and text.count("| uniform |") == 2 and text.count("| law_only |") == 1
    # 0.25 x 3 + 0.75 x 2 = 2.25 and + 0.75 x 2.1 = 2.325, before: 2.5
    assert "Objective mostly code: law 0.25, code 0.75" in text
    row = f"| {MINUS}8.50 ± 19.06 % |"
    assert f"| uniform {row} {NOTHING} |\n| x<y {row} +0.00 ± 0.00 |" in text
    assert f"| law_only | 25.0 % | {MINUS}25.00 ± 0.00 % | +2.50 ± 31.77 % |" in text
    assert "Scores of held-out answers" not in text  # nobody was asked
    assert "| base model | 4.000 | 2.000 |" in text and "| gamma of the base | 0.500 | 0.250 |" in text


def test_scores_of_answers_are_means_over_the_seeds_that_have_one():
    (found,) = score_summary([{"law": 0.5, "code": None}, {"law": 0.25, "code": None}]).items()
    assert found == ("law", interval([0.5, 0.25]))
    summary = {"base_score": {"law": 0.125, "code": None}, "arms": {"a": {"domain_score": dict([found])}}}
    (table,) = score_tables(summary)
    assert table.head == ["arm", "law", "code"]
    # (0.5 + 0.25) / 2, and t(1, 0.975) = 12.71 times 0.125
    assert table.rows == [("base model", ["12.5 %", NOTHING]), ("a", ["37.5 ± 158.8 %", NOTHING])]
