"""One picture of a benchmark: time and transient memory of every variant over those of the eager loss.

What is not covered: cases without an eager result (it ran out of memory): they are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loss_bench.results import BASELINE, CEILING, hardware_name

LONGEST_BAR = 2.5
"""Bars of slower variants are cut here and marked ">"; the number beside them is the true one."""


def draw(results: dict[str, Any], path: Path) -> str | None:
    """Write the picture, or say why there is none.

    Args:
        results: the content of results.json.
        path: a .png or .svg file.
    """
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in results["cases"] if _ratios(case, "time")]
    names = list(dict.fromkeys(name for case in cases for name in _ratios(case, "time")))
    if not cases:
        return "no case has an eager result"
    height = 1.2 + len(cases) * (0.35 + 0.16 * len(names))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), sharey=True, layout="constrained")
    colour_map = pyplot.get_cmap("tab20")
    for axis, what, title in (
        (axes[0], "time", "time / HF eager (forward + backward)"),
        (axes[1], "transient", "transient memory / HF eager"),
    ):
        for row, case in enumerate(cases):
            ratios = _ratios(case, what)
            for i, name in enumerate(names):
                if ratios.get(name) is None:
                    continue
                at = row + 0.8 * (i + 0.5) / len(names)
                shown = min(ratios[name], LONGEST_BAR)
                label = name if row == 0 and axis is axes[0] else None
                axis.barh(at, shown, 0.7 / len(names), color=colour_map(i % 20), label=label)
                cut = " >" if ratios[name] > LONGEST_BAR else " "
                axis.text(shown, at, f"{cut}{ratios[name]:.2f}", va="center", fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(title)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([row + 0.4 for row in range(len(cases))], [_label(case) for case in cases])
    axes[0].invert_yaxis()
    environment = results["environment"]
    figure.suptitle(f"Fused loss, {hardware_name(environment)}, {environment['date']}", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return None


def _ratios(case: dict[str, Any], what: str) -> dict[str, float]:
    """Variant -> ratio to the eager loss; the baseline itself and the memory of the ceiling are left out."""
    return {
        f"{variant['candidate']}, {variant['variant']}": variant["ratio_to_eager"][what]
        for variant in case["variants"]
        if variant.get("ratio_to_eager")
        and variant["candidate"] != BASELINE
        and not (variant["candidate"] == CEILING and what != "time")
    }


def _label(case: dict[str, Any]) -> str:
    about = case["case"]
    return f"{about['head']} N={about['num_tokens']}\n{about['supervised']:.0%} labelled, {about['dtype']}"
