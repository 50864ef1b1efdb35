"""The table of faults (`tests/mutants`) fits the source and the tests; `make mutants` tries them."""

from __future__ import annotations

import ast
import functools

from launching import REPOSITORY
from mutants import FILES, MUTANTS, TESTS, Mutant


def test_names_are_unique_and_every_file_has_a_fault():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.file for mutant in MUTANTS} == set(FILES)
    assert {test.partition("::")[0] for mutant in MUTANTS for test in mutant.tests} == set(TESTS.values())


def test_every_text_stands_once_in_its_file_and_what_takes_its_place_is_python():
    assert {mutant.name: problem for mutant in MUTANTS if (problem := problem_of_text(mutant))} == {}


def problem_of_text(mutant: Mutant) -> str | None:
    source = (REPOSITORY / FILES[mutant.file]).read_text(encoding="utf-8")
    if source.count(mutant.find) != 1:
        return f"its text stands {source.count(mutant.find)} times in {FILES[mutant.file]}"
    try:
        ast.parse(source.replace(mutant.find, mutant.put))
    except SyntaxError as error:
        return f"no Python: {error}"
    return None


def test_every_fault_names_tests_that_exist():
    assert {mutant.name: names for mutant in MUTANTS if (names := missing(mutant))} == {}
    assert [mutant.name for mutant in MUTANTS if not mutant.tests] == []


def missing(mutant: Mutant) -> list[str]:
    split = [node.partition("[")[0].partition("::") for node in mutant.tests]
    return [f"{path}::{name}" for path, _, name in split if name not in functions(path)]


@functools.cache
def functions(path: str) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
