"""Entry for `deepspeed launch/train.py --config FILE [section.key=value ...]`; the same as `versatune-ds
train`.

Works with and without a launcher. Without one it trains on a single device.
"""

import sys

# The folder of this file must not come first on the path: a module beside it could shadow an installed one.
if sys.path and sys.path[0].rstrip("/").endswith("launch"):
    sys.path.pop(0)

from versatune_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
