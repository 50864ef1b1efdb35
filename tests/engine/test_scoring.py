"""Scores of answers by hand, and functions of a user's."""

from __future__ import annotations

from decimal import Decimal

import pytest

from versatune_ds.config.answers import Answers
from versatune_ds.engine.answers.scoring import (
    build_scorer,
    checked,
    exact,
    label,
    last_number,
    number,
    try_on_reference,
)
from versatune_ds.foundations.errors import ConfigError


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Paris", "Paris", True),
        ("  Paris \n", "Paris", True),
        ("a  b\n\nc", "a b c", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("", "Paris", False),
        ("ab", "a b", False),
    ],
)
def test_exact_is_equality_but_for_white_space(answer, reference, same):
    assert exact(answer, reference) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", "1000"),
        ("It is 12,345,678.90 in all.", "12345678.9"),
        ("first 3, then 4.", "4"),
        ("$5", "5"),
        ("50 %", "50"),
        ("-7", "-7"),
        ("(-3)", "-3"),
        ("x = \u22122.50", "-2.5"),
        ("3-4", "4"),
        ("(a)-4", "4"),
        ("about .5", "0.5"),
        ("1.2.3", "3"),
        ("2.5e3 tokens", "2500"),
        ("1,5", "5"),
        ("1e-2", "0.01"),
        ("12 apples, no more", "12"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    found = last_number(text)
    assert found == (None if value is None else Decimal(value))


def test_number_compares_values_not_digits():
    assert number("so 1,000.0 it is", "#### 1000")
    assert not number("1000 or 1001", "1000")
    assert not number("no idea", "1000")
    assert not number("no idea", "none")


def test_label_is_the_first_one_found_whatever_its_case():
    score = label(["yes", "No", "not sure", "sure"])
    assert score("Yes, no doubt", "yes") and not score("Yes, no doubt", "No")
    assert score("I am not sure", "not sure") and not score("I am not sure", "sure")
    assert score("NOT  SURE.", "not sure")
    assert not score("nothing", "No"), "no is not a word there"
    assert not score("maybe", "No") and not score("", "No")


def test_labels_are_the_held_out_references_and_few():
    assert build_scorer("label", "law", lambda: ["A", "B", "A"])("b", "B")
    with pytest.raises(ConfigError, match="label: law has more than 100 different held-out answers"):
        build_scorer("label", "law", lambda: map(str, range(101)))


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "scores.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Half:\n"
        "    value: float = 0.5\n"
        "def overlap(answer, reference):\n"
        "    return Half().value if reference in answer else 0\n"
        "def words(answer, reference): return 'good'\n"
        "def percent(answer, reference): return 100\n"
        "def nothing(answer, reference): return float('nan')\n"
        "def broken(answer, reference): return answer.no_such_thing\n"
        "number = 3\n"
    )
    return path


def test_a_function_of_a_file_or_module_scores(written):
    score = build_scorer(f"{written}:overlap", "law", list)
    assert checked(score, "so Paris", "Paris") == 0.5 and checked(score, "Rome", "Paris") == 0.0
    assert checked(build_scorer("operator:eq", "law", list), "a", "a") == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scores.py:no_such", "AttributeError.*Give a function of a file"),
        ("missing.py:overlap", "FileNotFoundError"),
        ("scores.py:number", "is 3; give a function"),
    ],
)
def test_what_is_no_function_is_refused(written, name, expected):
    with pytest.raises(ConfigError, match=expected):
        build_scorer(f"{written.parent / name}", "law", list)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        build_scorer("no_such_module_here:score", "law", list)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("words", "gives 'good'"),
        ("percent", "gives 100"),
        ("nothing", "gives nan"),
        ("broken", "AttributeError"),
    ],
)
def test_a_function_is_tried_on_a_reference_before_the_run(written, function, expected):
    name = f"{written}:{function}"
    with pytest.raises(ConfigError, match=f"law.jsonl:3.*{expected}.*Mend the function"):
        try_on_reference(build_scorer(name, "law", list), name, "law.jsonl:3", "Paris")


def test_a_reference_without_a_number_is_refused_with_its_place():
    with pytest.raises(ConfigError, match=r"the reference of law.jsonl:3 \('Paris'\) holds no number"):
        try_on_reference(number, "number", "law.jsonl:3", "Paris")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("rouge", "score 'rouge': give exact, number, label"),
        ("a b:c", "score 'a b:c'"),
        ({}, "names no domain"),
    ],
)
def test_settings_name_a_score(score, expected):
    with pytest.raises(ValueError, match=expected):
        Answers(samples=1, max_new_tokens=1, score=score)
    assert Answers(samples=1, max_new_tokens=1, score={"law": "label"}).score_of("code") is None
