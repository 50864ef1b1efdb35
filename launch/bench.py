"""Entry for `deepspeed launch/bench.py --shape NAME ...` on many ranks; the same as `versatune-ds bench`.

Works with and without a launcher. Without one it measures a single device.
"""

import sys

# The folder of this file must not come first on the path: a module beside it could shadow an installed one.
if sys.path and sys.path[0].rstrip("/").endswith("launch"):
    sys.path.pop(0)

from versatune_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
