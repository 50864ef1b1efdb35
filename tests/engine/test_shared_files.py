"""What is said about caches that differ between nodes.

tests/cluster does the same with real nodes.
"""

from __future__ import annotations

import pytest

from versatune_ds.engine.preflight.shared_files import CacheView, check_shared_folder, compare_caches
from versatune_ds.foundations.errors import DataError, StateError, VersaTuneError

SAME = {"train/law": "a", "train/code": "b", "eval/law": "c"}


def view(host: str, problem: VersaTuneError | None = None, **changes: str) -> CacheView:
    """What one rank on `host` sees."""
    return CacheView(host, problem, {} if problem else SAME | changes)


@pytest.mark.parametrize("shared", [True, False])
def test_equal_caches_pass(shared):
    compare_caches([view("n1"), view("n1"), view("n2")], shared)


def test_a_problem_of_all_nodes_is_raised_as_it_is():
    problem = DataError("no such file", path="law.jsonl")
    for views in (
        [view("n1", problem), view("n2", problem)],
        [view("n1"), view("n1", problem)],  # one node: there is no other to compare with
    ):
        with pytest.raises(DataError) as raised:
            compare_caches(views, True)
        assert raised.value is problem


@pytest.mark.parametrize(
    ("shared", "advice"), [(True, "is it mounted there"), (False, "run prepare once on each")]
)
def test_nodes_without_a_cache_are_named_once_each(shared, advice):
    missing = StateError("the train data of law is not prepared")
    views = [view("n1"), view("n2", missing), view("n2", missing), view("n3"), view("n4", missing)]
    with pytest.raises(StateError) as raised:
        compare_caches(views, shared)
    text = str(raised.value)
    assert "on nodes n2, n4, and not on the other nodes: the train data of law is not prepared" in text
    assert advice in text


def test_nodes_with_other_content_are_named_with_what_differs():
    views = [view("n1"), view("n2", **{"train/code": "x", "eval/law": "y"}), view("n3")]
    with pytest.raises(StateError, match=r"on node n2 differ from those on n1 in eval/law, train/code\."):
        compare_caches(views, False)


def test_a_cache_that_one_node_has_too_much_differs():
    with pytest.raises(StateError, match=r"node n2 .*eval/code"):
        compare_caches([view("n1"), view("n2", **{"eval/code": "z"})], True)


def test_many_nodes_are_cut_short():
    views = [view("n0"), *(view(f"n{i}", **{"train/law": "x"}) for i in range(1, 13))]
    with pytest.raises(StateError, match="nodes n1, n2, n3, n4, n5, n6, n7, n8 and 4 more differ"):
        compare_caches(views, True)


def test_one_rank_needs_no_shared_folder(tmp_path):
    check_shared_folder(tmp_path / "not even there")
