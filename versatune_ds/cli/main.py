"""`versatune-ds VERB ...`: one short module per verb; errors meant for users are printed without a traceback.

`--help` imports neither torch nor DeepSpeed: a verb imports what it needs when it runs.

What is not covered: launching several ranks (`deepspeed launch/train.py` does).
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence

from versatune_ds import __version__
from versatune_ds.foundations.constants import EXIT_FAILURE, EXIT_OK
from versatune_ds.foundations.errors import PeerLostError, VersaTuneError
from versatune_ds.foundations.launch import join
from versatune_ds.foundations.log import get_logger, setup_logging

log = get_logger(__name__)

OTHER_RANKS_WAIT_S = 5.0
VERBS = (
    *("sample", "import-config", "prepare", "inspect", "plan", "detect", "reference", "search"),
    *("plan-weights", "train", "evaluate", "export", "report", "study", "doctor", "bench", "evidence"),
)
"""In the order of a project; each is a module of this folder."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="versatune-ds",
        description="Supervised fine-tuning on many domains with live domain weights (arXiv 2411.11266).",
    )
    parser.add_argument("--version", action="version", version=f"versatune-ds {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        verb = importlib.import_module(f"versatune_ds.cli.{name.replace('-', '_')}")
        text = verb.__doc__ or ""
        summary = text.partition("\n")[0].partition(": ")[2].removesuffix(".")
        verb_parser = subparsers.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        verb.add_arguments(verb_parser)
        verb_parser.set_defaults(run=verb.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code (see `foundations.constants`)."""
    restart_in_utf8()
    args = build_parser().parse_args(arguments)
    try:
        launched = join(args.verb, os.environ)
        setup_logging()
        if launched is not None:
            log.info("%s", launched)
        return int(args.run(args) or EXIT_OK)
    except VersaTuneError as error:
        if error.exit_code == EXIT_OK:  # stopped as asked
            print(error)
            return EXIT_OK
        rank = os.environ.get("RANK", "0")
        is_rank_0_gone = isinstance(error, PeerLostError) and 0 in error.ranks
        if rank != "0" and not is_rank_0_gone:
            # mostly rank 0 has the same to say, and its exit makes the launcher end this rank
            time.sleep(OTHER_RANKS_WAIT_S)
        where = f" [rank {rank}]" if rank != "0" else ""
        print(f"versatune-ds: error{where}: {error}", file=sys.stderr, flush=True)
        abandon_process_group()
        return error.exit_code
    except BrokenPipeError:  # `versatune-ds inspect | head`
        sys.stderr.close()
        return EXIT_FAILURE
    except Exception:
        traceback.print_exc()
        abandon_process_group()
        return EXIT_FAILURE


def restart_in_utf8() -> None:
    """Start this program anew where Python cannot name files and domains outside of ASCII (LC_ALL=C)."""
    if sys.getfilesystemencoding() == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show does not end a verb
        sys.stdout.reconfigure(errors="backslashreplace")


def abandon_process_group() -> None:
    """After an error: take the process group down, if this verb has one (else torch is not even loaded)."""
    if "versatune_ds.engine.backend.process_group" in sys.modules:
        from versatune_ds.engine.backend.process_group import leave_process_group

        leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
