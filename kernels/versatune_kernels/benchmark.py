"""CPU time and peak memory of the loss on the CPU, against the full-logits way of eager models.

    python -m versatune_kernels.benchmark --tokens 512 2048 --dtype bfloat16

How: every measurement is a process of its own (a peak cannot be lowered within one), and the two
rivals alternate. Each process makes the inputs, runs forward and backward once to warm up, then
`--repeats` times, and reports its median CPU time (summed over threads; waiting for a busy machine
does not count) and the peak of its resident memory above the inputs, gradients included. "full
logits" is F.linear, the cast to fp32 that Hugging Face models make, and F.cross_entropy.

What is not covered: GPUs, which need device events and the allocator's own statistics; machines
without /proc (the peak is Linux's VmHWM).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from versatune_kernels.loss import linear_cross_entropy

RIVALS = ("full logits", "chunked")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fused loss against full logits, on the CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--valid", type=float, default=1.0, help="share of tokens with a label")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=RIVALS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args)))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} thread(s), V {args.vocab}, H {args.hidden}, {args.dtype}")
    for num_tokens in args.tokens:
        results = [_in_own_process(rival, num_tokens) for rival in RIVALS]
        for rival, (seconds, peak_gib, loss) in zip(RIVALS, results, strict=True):
            print(
                f"N {num_tokens} valid {args.valid:.0%} {rival:12s} loss {loss:.5f} "
                f"cpu_time_s {seconds:.3f} ({seconds / results[0][0]:.2f}x) "
                f"peak_gib {peak_gib:.2f} ({peak_gib / results[0][1]:.2f}x)"
            )


def _in_own_process(rival: str, num_tokens: int) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "versatune_kernels.benchmark", *sys.argv[1:]]
    command += ["--one", rival, "--tokens", str(num_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak_gib, loss = json.loads(done.stdout)
    return seconds, peak_gib, loss


def _measure(args: argparse.Namespace) -> tuple[float, float, float]:
    """(median CPU seconds, peak GiB above the inputs, loss) of one rival in this process."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    num_tokens = args.tokens[0]
    hidden = torch.randn(num_tokens, args.hidden, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(args.vocab, args.hidden, generator=g).div_(args.hidden**0.5)
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(0, args.vocab, (num_tokens,), generator=g)
    labels[torch.rand(num_tokens, generator=g) >= args.valid] = -100

    base = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts a new peak
    seconds, loss = [], torch.zeros(())
    for _ in range(args.repeats + 1):
        hidden.grad = weight.grad = None
        start = time.process_time()
        loss = _loss(args.one, hidden, weight, labels)
        loss.backward()
        seconds.append(time.process_time() - start)
    peak = _resident_bytes("VmHWM") - base
    return statistics.median(seconds[1:]), peak / 2**30, loss.item()


def _loss(rival: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    num_valid = int((labels != -100).sum())
    if rival == "chunked":
        return linear_cross_entropy(
            hidden, weight, labels, normalizer=num_valid, backend="chunked"
        ).loss
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_valid


def _resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
