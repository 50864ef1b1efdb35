"""Anonymous memory of an export; usage: export_memory.py SHARD_BYTES OUT_FOLDER CHECKPOINT...

Prints a JSON line per checkpoint: bytes of the process before and at most while it exported it in fp32.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

from transformers import LlamaConfig

from versatune_ds.engine.checkpointing.hf_export import export_checkpoint


class NoCompanions:
    """Weights only."""

    adapter_of = None

    def save(self, folder: Path) -> None:
        pass


def anonymous_bytes() -> int:
    """Memory that only this process has, without mapped files."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found.group(1))


class Peak(threading.Thread):
    """Looks a thousand times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.is_over = 0, False

    def run(self) -> None:
        while not self.is_over:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.001)


def main() -> None:
    shard_bytes, out = int(sys.argv[1]), Path(sys.argv[2])
    for checkpoint in map(Path, sys.argv[3:]):
        gc.collect()
        before, peak = anonymous_bytes(), Peak()
        peak.start()
        export_checkpoint(
            checkpoint, LlamaConfig(), NoCompanions(), out / checkpoint.name, "fp32", shard_bytes
        )
        peak.is_over = True
        peak.join()
        print(json.dumps({"checkpoint": checkpoint.name, "before": before, "peak": peak.bytes}), flush=True)


if __name__ == "__main__":
    main()
