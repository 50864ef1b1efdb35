"""The console of a run: a progress bar on a terminal, short lines elsewhere, silence on other ranks.

On a terminal a tqdm bar shows step, ETA, loss and tokens per second; lines of the package's log are
written above it. Where standard error is no terminal (a launcher's pipe, a SLURM log) one compact line
follows every few seconds, always for the first and last step, and for a skipped one:

    step 120/300 40% | loss 2.314 | law 3.21v med 2.90^ | 12.3k tok/s | ETA 3m12s

An arrow tells how a domain's smoothed loss moved since the last line. Weights are printed when they moved.

What is not covered: metrics (`records`, `sinks`) and the log of other modules (`foundations.log`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from versatune_ds.foundations import log
from versatune_ds.foundations.json_input import finite
from versatune_ds.observability.records import EvalRecord, StepRecord, by_domain

LOSS_SMOOTHING = 0.8
"""Share that the smoothed loss keeps at each step; 0.8 averages over about five steps."""
ARROW_MIN_CHANGE = 0.0005
"""Smallest change of a smoothed loss, in nats, that gets an arrow; below it the digits hardly move."""
WEIGHT_MIN_CHANGE = 0.0005
"""Smallest change of a weight that is shown: half of the last printed digit (0.1 %)."""
MAX_DOMAINS_SHOWN = 8
"""More domains than this do not fit a line; the ones with the largest weights are shown."""
SHORT_NAME_LENGTH = 10


def si(value: float | None) -> str:
    """A count or rate in at most four characters and a unit prefix: 950, 12.3k, 4.57M; `-` for None."""
    if value is None:
        return "-"
    for limit, factor, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e3, "k")):
        if abs(value) >= limit * 0.99995:
            scaled = value / factor
            return f"{scaled:.2f}{prefix}" if scaled < 9.995 else f"{scaled:.1f}{prefix}"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42s, 3m12s, 2h05m, 3d04h; `-` for None."""
    if seconds is None:
        return "-"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names cut for a line; the full ones where the cut makes two of them equal."""
    cut = {name: name[:SHORT_NAME_LENGTH].rstrip("_- ") for name in names}
    twice = {short for short in cut.values() if list(cut.values()).count(short) > 1}
    return {name: name if short in twice else short for name, short in cut.items()}


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: a terminal that knows its width (some launchers give one of 0 columns)."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def weights_text(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """How weights moved, in percent: `law 16.7->18.2 code 50.1->48.6`; of many the largest changes."""
    changes = {name: abs(after[name] - before.get(name, 0.0)) for name in after}
    moved = [name for name in after if changes[name] >= WEIGHT_MIN_CHANGE]
    largest = set(sorted(moved, key=lambda name: -changes[name])[:MAX_DOMAINS_SHOWN])
    short = short_names(list(after))
    parts = [
        f"{short[name]} {100 * before.get(name, 0.0):.1f}->{100 * after[name]:.1f}"
        for name in moved
        if name in largest
    ]
    more = len(moved) - len(parts)
    return " ".join(parts) + (f" (+{more} more)" if more > 0 else "")


class Progress:
    """Console of rank 0. Every method is cheap and never raises for what it is told to print.

    Args:
        done_steps: steps done before this process (a resumed run).
        is_main: False on ranks other than 0: nothing is ever printed.
        stream: where to print; default standard error.
        interval_s: seconds between lines where there is no terminal.
        bar: force the bar on or off; default: on when the stream is a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        names: Sequence[str],
        *,
        done_steps: int = 0,
        is_main: bool = True,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        bar: bool | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._names = list(names)
        self._done_at_start = done_steps
        self._is_main = is_main
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._smoothed: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._started_s = time.monotonic()
        self._printed_s: float | None = None
        self._tokens_since_print = 0
        self._step_s_since_print = 0.0
        encoding = (getattr(self._stream, "encoding", None) or "ascii").lower()
        self._down, self._up = ("↓", "↑") if encoding.startswith("utf") else ("v", "^")
        self._cleanup = contextlib.ExitStack()
        self._bar: Any = None
        if is_main and (is_terminal(self._stream) if bar is None else bar):
            self._bar = tqdm(
                total=total_steps,
                initial=done_steps,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:12}| ETA {remaining}{postfix}",
            )
            package_log = logging.getLogger(log.ROOT)
            self._cleanup.enter_context(logging_redirect_tqdm(loggers=[package_log]))

    def step(self, record: StepRecord) -> None:
        """Show one finished step: advance the bar, or print a line when one is due."""
        if not self._is_main:
            return
        self._smooth(record)
        self._tokens_since_print += record.real_tokens
        self._step_s_since_print += record.step_s
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(self._facts(record)), refresh=False)
            self._bar.update(record.step - self._bar.n)
            if record.skipped:
                self.note(self._skipped_text(record))
            return
        now = time.monotonic()
        due = self._printed_s is None or now - self._printed_s >= self._interval_s
        if due or record.skipped or record.step >= self._total_steps:
            self._print(self._line(record, now))
            self._printed_s = now
            self._tokens_since_print, self._step_s_since_print = 0, 0.0

    def weight_update(self, line: Mapping[str, Any]) -> None:
        """Say how the weights moved; `line` is a line of weights.jsonl (`before`, `after`, `applied`)."""
        if not self._is_main:
            return
        before = {n: v or 0.0 for n, v in by_domain(self._names, line["before"]).items()}
        after = {n: v or 0.0 for n, v in by_domain(self._names, line["after"]).items()}
        text = weights_text(before, after) or "unchanged"
        shadow = "" if line.get("applied", True) else " (shadow: not applied)"
        self.note(f"weights after step {line['step']}: {text}{shadow}")
        for alarm in line.get("alarms") or []:
            self.note(f"  alarm: {alarm}")

    def evaluation(self, record: EvalRecord) -> None:
        """One line with the held-out losses and the scores of answers."""
        if not self._is_main:
            return
        short = short_names(self._names)
        parts = [
            f"{short[name]} {loss:.3f}"
            for name in self._names
            if (loss := finite(record.domain_loss.get(name))) is not None
        ]
        overall = "-" if record.loss is None else f"{record.loss:.3f}"
        facts = [f"eval after step {record.step}: loss {overall}", " ".join(parts)]
        scores = [f"{short[n]} {score:.2f}" for n, score in record.domain_score.items() if score is not None]
        if scores:
            facts.append(f"score {' '.join(scores)}")
        facts.append(duration(record.eval_s + (record.generate_s or 0.0)))
        self.note(" | ".join(facts))

    def note(self, text: str) -> None:
        """Print a line of text (above the bar when there is one)."""
        if self._is_main:
            self._print(text)

    def close(self) -> None:
        """End the bar and give the log back its own way of writing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._cleanup.close()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _smooth(self, record: StepRecord) -> None:
        for name, value in record.domain_loss.items():
            loss = finite(value)
            if loss is None or record.skipped:
                continue
            old = self._smoothed.get(name, loss)
            self._smoothed[name] = LOSS_SMOOTHING * old + (1 - LOSS_SMOOTHING) * loss

    def _domains_text(self, record: StepRecord) -> str:
        """`law 3.21v med 2.90^`: smoothed losses and how they moved since this was last called."""
        shown = [name for name in self._names if name in self._smoothed]
        if len(shown) > MAX_DOMAINS_SHOWN:
            largest = sorted(shown, key=lambda name: -record.weights.get(name, 0.0))
            shown = [name for name in shown if name in set(largest[:MAX_DOMAINS_SHOWN])]
        short = short_names(self._names)
        parts = []
        for name in shown:
            change = self._smoothed[name] - self._shown.get(name, self._smoothed[name])
            arrow = ""
            if abs(change) >= ARROW_MIN_CHANGE:
                arrow = self._down if change < 0 else self._up
            parts.append(f"{short[name]} {self._smoothed[name]:.2f}{arrow}")
        self._shown = dict(self._smoothed)
        return " ".join(parts)

    def _facts(self, record: StepRecord) -> list[str]:
        """Loss, domain losses, rate and MFU as texts."""
        loss = finite(record.loss)
        facts = ["loss -" if loss is None else f"loss {loss:.3f}"]
        if domains := self._domains_text(record):
            facts.append(domains)
        rate = self._tokens_since_print / self._step_s_since_print if self._step_s_since_print else None
        facts.append(f"{si(rate)} tok/s")
        utilisation = finite(record.mfu)
        if utilisation is not None:
            common = finite(record.mfu_6n)
            other = "" if common is None else f" (6N {100 * common:.1f}%)"
            facts.append(f"MFU {100 * utilisation:.1f}%{other}")
        return facts

    def _line(self, record: StepRecord, now: float) -> str:
        done_here = record.step - self._done_at_start
        elapsed = now - self._started_s
        remaining = self._total_steps - record.step
        eta = elapsed / done_here * remaining if done_here > 0 else None
        head = f"step {record.step}/{self._total_steps} {100 * record.step // self._total_steps}%"
        if record.skipped:
            head = self._skipped_text(record)
        end = f"took {duration(elapsed)}" if remaining <= 0 else f"ETA {duration(eta)}"
        return " | ".join([head, *self._facts(record), end])

    @staticmethod
    def _skipped_text(record: StepRecord) -> str:
        return f"step {record.step} SKIPPED ({record.skip_reason}; parameters unchanged)"
