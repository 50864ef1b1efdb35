"""The picture of knowledge distributions: a bar a model, a segment a domain, numbers where there is room."""

import json

from matplotlib.figure import Figure

from versatune_ds.report import figures as drawing
from versatune_ds.report.figures import Stack, stacked_bars
from versatune_ds.report.knowledge import draw_knowledge


def test_bars_segments_and_labels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        drawing, "Figure", lambda **settings: figures.append(Figure(**settings)) or figures[-1]
    )
    files = {
        "first": {
            "domains": {"law": 0.02, "code": 0.98},
            "model": {"source": "a/very/long/path/to/a/model/that/goes/on/first", "weights": "random"},
            "judge": {"kind": "classifier"},
            "texts": {"judged": 12},
        },
        "by_hand": {"domains": {"code": 0.5, "$other$": 0.5}},
    }
    paths = []
    for name, content in files.items():
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "knowledge.json")
        paths[-1].write_text(json.dumps(content))
    draw_knowledge(paths, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    bars = [
        (patch.get_y() + patch.get_height() / 2, patch.get_x(), patch.get_width()) for patch in axes.patches
    ]
    # domains law, code, $other$ in both bars; one that a file does not know has no width
    assert [tuple(round(x, 9) for x in bar) for bar in bars] == [
        (0, 0, 0.02), (0, 0.02, 0.98), (0, 1, 0), (1, 0, 0), (1, 0, 0.5), (1, 0.5, 0.5),
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["98.0", "50.0", "50.0"]
    first, second = (label.get_text() for label in axes.get_yticklabels())
    assert first.startswith("…") and first.endswith("goes/on/first\n12 texts, classifier, random weights")
    assert second == "by_hand"
    colors = [patch.get_facecolor() for patch in axes.patches]
    assert colors[:3] == colors[3:] and len(set(colors)) == 3


def test_from_the_seventh_domain_on_segments_are_hatched():
    (axes,) = stacked_bars([Stack("model", {f"d{i}": 1 / 8 for i in range(8)})], "share").axes
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in axes.patches]
    assert len({color for color, _ in looks}) == 6 and len(set(looks)) == 8
