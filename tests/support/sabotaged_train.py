"""`versatune-ds train` with a fault built in, for exit codes and outputs; a script started by `launch`.

Usage: sabotaged_train.py SABOTAGE ARGUMENT...: a name in train_cases.SABOTAGE, then arguments of the verb.
"""

from __future__ import annotations

import sys

from train_cases import SABOTAGE

from versatune_ds.cli.main import main

if __name__ == "__main__":
    SABOTAGE[sys.argv[1]]()
    sys.exit(main(["train", *sys.argv[2:]]))
