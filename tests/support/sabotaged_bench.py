"""`versatune-ds bench` whose rank 1 has no memory for a slice of one layer; a script started by `launch`."""

from __future__ import annotations

import sys

from versatune_ds.apps.bench import slices as bench_slices
from versatune_ds.cli.main import main

SLICE = """
import sys
import torch
from versatune_ds.apps.bench import trainer as bench
from versatune_ds.apps.bench import slices as bench_slices
from versatune_ds.foundations import distributed

measure = bench.measure

def sabotaged(run, settings, ceiling_tflops):
    if distributed.rank() == 1 and run.shape.layers == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return measure(run, settings, ceiling_tflops)

bench.measure = sabotaged
sys.exit(bench_slices.main(sys.argv[1:]))
"""

if __name__ == "__main__":
    bench_slices.COMMAND = (sys.executable, "-c", SLICE)
    sys.exit(main(["bench", *sys.argv[1:]]))
