"""The page holds the run's numbers, escapes everything, needs no network, and copes with what is missing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from launching import REPOSITORY

from versatune_ds.cli.main import main
from versatune_ds.domain.evaluation import BenchmarkScore, ModelEvaluation
from versatune_ds.domain.reference import Fingerprints
from versatune_ds.foundations.errors import StateError
from versatune_ds.report.figures import spread
from versatune_ds.report.measures import MINUS, cumulative_shares, thin, thin_steps, train_loss
from versatune_ds.report.report import render, write_report
from versatune_ds.report.runs import read_run, read_runs


class Page(HTMLParser):
    """Visible text and tags of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def flat(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def page_of(*folders):
    return Page(render(read_runs(folders)))


def test_a_run_s_numbers_are_on_the_page(make_run):
    text = page_of(make_run()).flat()
    assert "20 steps, complete" in text
    assert "7.62B parameters" in text  # 7,615,616,512
    assert f"5.750 → 2.625 ({MINUS}54.3 %)" in text  # held-out over both domains: 5.25, 6.25 and 2.125, 3.125
    assert f"5.250 → 2.125 {MINUS}59.5 %" in text  # law
    # means of steps 1-5 and 16-20 (window 5): 3 - 0.01 x 3 and 3 - 0.01 x 18
    assert "2.970 → 2.820" in text
    assert "500 real tokens/s (250 per rank), median" in text
    assert "20.0k real" in text  # 20 steps x 1000 tokens
    assert "97.66 %" in text  # 1000 / 1024
    assert "torch 2.13.0" in text
    assert "spread of gamma is below 0.001" in text and "law was absent" in text


def test_the_kl_to_the_base_is_a_column_of_runs_that_have_it(make_run):
    assert "KL to base" not in page_of(make_run()).flat()
    page = page_of(make_run("held", base_kl=0.25, domain_base_kl={"law": 0.2525, "code": None})).flat()
    assert "KL to base" in page and f"{MINUS}59.5 % 0.253" in page


def test_what_the_guard_saw_is_drawn_by_domain(make_run):
    assert "The guard" not in page_of(make_run()).flat()
    seen = {"law": {"held": True, "rise": 0.25}, "code": {"held": False, "rise": -0.5}}
    run = read_run(make_run("guarded", guard=seen))
    np.testing.assert_array_equal(run.updates["rise"], [[0.25, -0.5]])
    np.testing.assert_array_equal(run.updates["held_rise"], [[0.25, np.nan]])
    html = render([run])
    assert "The guard" in Page(html).flat()
    for name in run.names:
        assert f"rise of the held-out loss of {name}" in html


@pytest.mark.parametrize("guard", [[1], {"law": 0.5}, {"law": {"rise": "much", "held": 1}}])
def test_a_guard_s_record_that_is_damaged_is_left_out(make_run, guard):
    assert "The guard" not in page_of(make_run(guard=guard)).flat()


def test_domain_names_are_escaped_everywhere(make_run):
    name = '<script>alert(1)</script> & $x_1$ "q"'
    html = render([read_run(make_run(names=(name, "code")))])
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html and "alert(1)" in page.flat()


def test_the_page_is_self_contained_and_coloured_by_its_style_sheet(make_run):
    html = render([read_run(make_run())])
    assert "<script" not in html and "<link" not in html and "<img" not in html
    urls = set(re.findall(r'(?:https?:)?//[^\s"\'<>)]+', html))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses
    pictures = "".join(re.findall(r"<svg role.*?</svg>", html, flags=re.DOTALL))
    assert "var(--c0)" in pictures and "var(--ink)" in pictures
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == []


def test_several_runs_are_compared(make_run):
    html = render(read_runs([make_run("one"), make_run("two", steps=10)]))
    text = Page(html).flat()
    assert "Comparison of 2 runs" in text
    assert "10 of 20 steps: running or stopped" in text
    assert text.count("2.125") >= 2  # both runs in the table of held-out losses
    assert html.count('class="best"') >= 3  # two domains and all domains
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_a_run_that_has_only_begun(make_run):
    text = page_of(make_run(steps=0, evaluations=False, updates=False)).flat()
    assert "0 of 20 steps: running or stopped" in text
    for hint in ("No step and no evaluation", "No weights are recorded", "No weight update is recorded"):
        assert hint in text


def test_a_killed_run_without_evaluations_or_updates(make_run):
    folder = make_run(evaluations=False, updates=False, steps=7)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8')
    text = page_of(folder).flat()
    assert "last line (8) is incomplete" in text
    assert "set data.eval and evaluation.every_n_steps" in text
    assert "the weights are constant" in text


def test_a_folder_with_metrics_of_other_making(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    text = page_of(tmp_path).flat()
    assert "2 steps" in text and "run.json is missing" in text


def test_an_evaluation_of_the_finished_model_is_shown(make_run):
    folder = make_run()
    score = BenchmarkScore("t", "Bar exam", "law", "acc", 0.625, None, 8)
    ModelEvaluation(
        model="runs/<b>model",
        losses={"law": np.array([2.0, 4.0]), "code": np.array([1.5])},
        tokens={"law": np.array([1.0, 2.0]), "code": np.array([1.0])},
        fingerprints=Fingerprints(),
        benchmarks=(score,),
    ).write(folder / "evaluation.json")
    page = write_report([folder]).read_text()
    assert "Evaluation of runs/&lt;b&gt;model" in page and "7.39" in page  # exp(2)
    assert "Bar exam" in page and "0.625" in page
    (folder / "evaluation.json").write_text("{")
    page = write_report([folder]).read_text()
    assert "Evaluation of" not in page and "cut short" in page


def test_a_run_of_an_earlier_version_is_shown_whole():
    """Written by 812f8c4, which knew no MFU of 6 N."""
    run = read_run(REPOSITORY / "tests" / "support" / "begun_at_812f8c4" / "run")
    assert run.notes == () and run.steps.tolist() == list(range(1, 9)) and len(run.update_steps) == 4
    html = render([run])
    text = Page(html).flat()
    assert "8 steps, complete" in text and "raw_loss; a weight is a share of samples" in text
    assert "5.853 → 4.856" in text and "50.0 % → " in text and "is recorded yet" not in text
    for section in (
        "summary",
        "domains",
        "weights",
        "losses",
        "signals",
        "shares",
        "speed",
        "alarms",
        "settings",
    ):
        assert f'<section id="{section}">' in html and f'href="#{section}"' in html
    assert html.count("<svg role") == 2 + 3 + 1 + 2 + 2  # weights (wide, narrow), losses, phi, shares, speed


def test_skipped_steps_are_listed(make_run):
    text = page_of(make_run(skipped=True, skip_reason="loss spike", steps=2)).flat()
    assert "loss spike: no rank changed its parameters" in text


def test_skipped_steps_of_a_run_that_recorded_no_reason_are_listed(make_run):
    assert "no rank changed its parameters" in page_of(make_run(skipped=True, steps=2)).flat()


def test_the_probe_has_its_share_of_the_step(make_run):
    """A step takes 2 s, of which 0.1 s are waiting (conftest.py)."""
    text = page_of(make_run(update_s=0.5, probe_s=0.4)).flat()
    assert "weight updates 0.5000 s (25.00 %)" in text
    assert "held-out probe 0.4000 s (20.00 %)" in text
    assert "forward, backward, optimizer 1.4000 s (70.00 %)" in text  # the probe is not taken off twice


def test_runs_with_different_domains(make_run):
    text = page_of(make_run("one"), make_run("two", names=("law", "poetry"))).flat()
    assert "code" in text and "poetry" in text


@pytest.mark.parametrize("k", [1, 9])
def test_any_number_of_domains(make_run, k):
    names = [f"domain number {i} with a long name" for i in range(k)]
    text = page_of(make_run(names=names)).flat()
    assert names[-1] in text


def test_cumulative_shares_weigh_steps_by_size(make_run):
    folder = make_run(steps=2)
    run = read_run(folder)
    run.series["samples"][:] = [10, 30]
    run.shares["samples"][:] = [[1.0, 0.0], [0.5, 0.5]]
    # (10 x 1 + 30 x 0.5) / 40 = 0.625
    assert cumulative_shares(run, run.shares["samples"], "samples").tolist() == [[1.0, 0.0], [0.625, 0.375]]


def test_train_loss_is_a_mean_over_tokens(make_run):
    run = read_run(make_run(steps=10))
    first, last = train_loss(run)
    assert (round(first, 6), round(last, 6)) == (3.97, 3.92)  # steps 1-5 and 6-10 of 4 - 0.01 step


def test_verb_prints_the_path_and_writes_beside_the_run(make_run, capsys):
    folder = make_run()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_several_runs_are_written_to_the_current_folder(make_run, tmp_path, monkeypatch):
    runs = [make_run("one", steps=1), make_run("two", steps=1)]
    monkeypatch.chdir(tmp_path)
    assert write_report(runs).resolve() == tmp_path / "report.html"


def test_the_page_goes_where_out_says(make_run, tmp_path):
    page = write_report([make_run(steps=1)], tmp_path / "new" / "page.html")
    assert page == tmp_path / "new" / "page.html" and page.is_file()


def test_unwritable_place_is_a_clear_error(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="--out"):
        write_report([make_run()], tmp_path / "file" / "page.html")


def test_labels_are_spread_apart_in_order():
    placed = spread(np.array([0.0, 1.0, 50.0, 99.0, 100.0]), gap=12.0, length=100.0)
    assert (np.diff(placed) >= 12 - 1e-9).all() and placed[0] >= 0 and placed[-1] <= 100
    assert placed[2] == 50.0  # the one with room stays


def test_thinning_keeps_means_and_steps():
    x = np.arange(1000.0)
    short_x, short_y = thin(x, 2 * x, max_points=100)
    assert len(short_x) == 100 and np.allclose(short_y, 2 * short_x)
    kept_x, kept_y = thin_steps(np.arange(6.0), np.array([1.0, 1, 1, 2, 2, 2]))
    assert kept_x.tolist() == [0, 2, 3, 5] and kept_y.tolist() == [1, 1, 2, 2]
