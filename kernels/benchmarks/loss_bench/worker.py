"""One candidate in a process of its own, told what to do by lines of JSON on its standard input.

    {"do": "gate", "case": {...}, "variant": NAME, "answers": FILE}
        choose the best chunk, compare with fp64
    {"do": "turn", "case": {...}, "variant": NAME, "chunk": c, "warmups": w, "runs": r}
        time r runs after w unmeasured ones

Each line is answered by one line with "status": "ok", "no such knob", "out of memory" or "error". The
inputs are made for a request and dropped before its answer: of all candidates one holds memory of the
device at a time. A run is forward, backward and nothing else; gradients are dropped before it. Time
is wall and CPU seconds of this process or, on a GPU, the device's: events, behind a kernel that spins
for some milliseconds, so that the host, which takes up to half a millisecond to reach the first
product, is ahead of the device as it is in training. What the host itself needs stands beside it; of
a candidate that waits for the device in between, that wait is in both.

What is not covered: the order of turns (`driver`).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loss_bench.candidates import (
    CANDIDATES,
    IGNORE_INDEX,
    Candidate,
    Inputs,
    NoSuchKnob,
    Variant,
    chunk_choices,
)
from loss_bench.cases import Case
from loss_bench.gate import Gate
from loss_bench.memory import PeakMemory

SAMPLE_TOKENS = 512
HEAD_START_CYCLES = 20_000_000
"""Of the GPU's clock, 10 ms at 2 GHz: many times what a candidate's host needs up to its first product."""


def serve(name: str, device_type: str) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    worker = Worker(CANDIDATES[name], torch.device(device_type))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"status": "ok", **worker.answer(request)}
        except NoSuchKnob as error:
            reply = {"status": "no such knob", "reason": str(error)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            reply = {"status": "out of memory", "reason": str(error).splitlines()[0]}
        except Exception as error:  # a rival's failure is a result, not the end of the benchmark
            reply = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:500]}
        worker.tidy()
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class Worker:
    """One candidate on one device."""

    def __init__(self, candidate: Candidate, device: torch.device) -> None:
        self.candidate = candidate
        self.device = device
        self.inputs: Inputs | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says."""
        what = request["do"]
        variant = next(v for v in self.candidate.variants if v.name == request["variant"])
        self.inputs = make_inputs(Case(**request["case"]), self.device)
        self.inputs.weight.requires_grad_(not variant.frozen)
        if what == "gate":
            return self.gate(variant, Path(request["answers"]))
        if what == "turn":
            return self.turn(variant, request["chunk"], request["warmups"], request["runs"])
        raise ValueError(f"unknown request {what!r}")

    def gate(self, variant: Variant, answers: Path) -> dict[str, Any]:
        """The chunk that the variant will use, and the gate's verdict on it."""
        inputs = self._inputs()
        chunk, tried = self._choose_chunk(variant) if variant.sweeps_chunk else (None, {})
        verdict: dict[str, Any] = {"verdict": "none"}
        if not self.candidate.is_ceiling:
            verdict = Gate(inputs, answers).judge(lambda given: self._loss(given, variant, chunk))
        return {"gate": verdict, "chunk": chunk, "chunks_tried_s": tried}

    def _choose_chunk(self, variant: Variant) -> tuple[int | None, dict[int, float]]:
        """The fastest of a few chunk sizes, and the seconds of all."""
        tried = {}
        for chunk in chunk_choices(self.candidate.name, len(self._inputs().labels), self.device.type):
            self._run(variant, chunk)
            runs = [self._run(variant, chunk) for _ in range(3 if self._cuda else 1)]
            tried[chunk] = statistics.median(run["s" if self._cuda else "cpu_s"] for run in runs)
        return min(tried, key=lambda chunk: tried[chunk]), tried

    def turn(self, variant: Variant, chunk: int | None, warmups: int, runs: int) -> dict[str, Any]:
        """Seconds of `runs` runs, and the peak memory of one."""
        for _ in range(warmups):
            self._run(variant, chunk)
        inputs = self._inputs()
        inputs.hidden.grad = inputs.weight.grad = None
        memory = PeakMemory(self.device)
        measured = [self._run(variant, chunk) for _ in range(runs)]
        dx, dw = inputs.hidden.grad, inputs.weight.grad
        assert dx is not None and (dw is None) == variant.frozen
        return {
            **{clock: [run[clock] for run in measured] for clock in measured[0]},
            "peak_bytes": memory.bytes(),
            "dx_bytes": dx.nbytes,
            "dw_bytes": 0 if dw is None else dw.nbytes,
        }

    def tidy(self) -> None:
        """Between two requests hold nothing: the other candidates need the memory."""
        self.inputs = None
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _inputs(self) -> Inputs:
        if self.inputs is None:
            raise ValueError("no case was prepared")
        return self.inputs

    def _loss(self, inputs: Inputs, variant: Variant, chunk: int | None) -> Any:
        return self.candidate.loss(inputs, chunk, **variant.options)

    def _run(self, variant: Variant, chunk: int | None) -> dict[str, float]:
        """One forward and backward, timed: "s", "cpu_s" and, on a GPU, "host_s"."""
        inputs = self._inputs()
        inputs.hidden.grad = inputs.weight.grad = None
        begin = end = None
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            begin.record()
        start_cpu, start = time.process_time(), time.perf_counter()
        out = self._loss(inputs, variant, chunk)
        if out is not None:
            (out if isinstance(out, Tensor) else out.loss).backward()
        seconds = time.perf_counter() - start
        clocks = {"s": seconds, "cpu_s": time.process_time() - start_cpu}
        if begin is not None and end is not None:
            end.record()
            end.synchronize()
            clocks.update(s=begin.elapsed_time(end) / 1e3, host_s=seconds)
        return clocks


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Inputs of a case, the same in every process: random, or real hidden states from the case's file."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    n, h, v = case.num_tokens, case.hidden_size, case.vocab_size
    if case.states is None:
        hidden = torch.randn(n, h, generator=generator, device=device).to(dtype)
        weight = torch.empty(v, h, dtype=dtype, device=device)
        for block in weight.split(8192):
            block.copy_(torch.randn(block.shape, generator=generator, device=device))
        weight.mul_(case.sharpness / h**0.5)
        labels = torch.randint(0, v, (n,), generator=generator, device=device)
    else:
        hidden, weight, labels = read_states(Path(case.states), n, device, dtype)
    # where the labels are missing changes nothing: random rows lose theirs
    order = torch.rand(n, generator=generator, device=device).argsort()
    labels[order[case.num_valid :]] = IGNORE_INDEX
    if case.states is None:
        labels[order[: min(2, case.num_valid)]] = torch.tensor([0, v - 1], device=device)[: case.num_valid]
    sample_ids = (torch.arange(n, device=device) // SAMPLE_TOKENS).to(torch.int32)
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        labels=labels,
        sample_ids=sample_ids,
        num_samples=-(-n // SAMPLE_TOKENS),
        num_valid=case.num_valid,
    )


def read_states(
    path: Path, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H] and labels [N] of a safetensors file, cut to the first N rows."""
    from safetensors.torch import load_file

    tensors = load_file(path, device=str(device))
    hidden, labels = (tensors[name][:num_tokens] for name in ("hidden", "labels"))
    if len(hidden) < num_tokens or bool((labels < 0).any()):
        raise ValueError(f"{path}: {num_tokens} rows that all have a label are needed")
    return hidden.to(dtype).contiguous(), tensors["weight"].to(dtype), labels.to(torch.int64).clone()
