"""`versatune-ds prepare`: tokenise the data of a configuration into the cache that training reads.

Tokenises training and held-out data in parallel into data.cache_dir. What is there already is checked and
reused; after an interruption the work goes on where it stopped. `versatune-ds inspect` shows the content.
"""

from __future__ import annotations

import argparse
import time

from versatune_ds.cli import add_settings

add_arguments = add_settings


def run(args: argparse.Namespace) -> None:
    from versatune_ds.config.derive import proxy_config
    from versatune_ds.config.load import load_config
    from versatune_ds.data.cache.prepare import prepare

    config = load_config(args.config, args.overrides, to_train=False)
    start = time.monotonic()
    prepared = prepare(config)
    print(prepared.table())
    reused = prepared.reused
    if config.reference.model is not None:  # another tokenizer needs caches of its own
        prepared = prepare(proxy_config(config))
        if not prepared.reused:
            print(f"for reference.model ({config.reference.model.source}):\n{prepared.table()}")
        reused = reused and prepared.reused
    done = "nothing to do, all data was prepared before" if reused else "prepared"
    print(f"{done}: {config.data.cache_dir} ({time.monotonic() - start:.1f} s)")
