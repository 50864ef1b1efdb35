"""`versatune-ds sample FOLDER`: unpack the shipped sample corpus, its tokenizer and a tiny model.

Prints what was written and the next command. A second run changes nothing and says so.

What is not covered: preparation and training; `prepare` and `train` are verbs of their own.
"""

from __future__ import annotations

import argparse

DEFAULT_FOLDER = "runs/sample"
NEXT_COMMAND = "versatune-ds prepare --config configs/quickstart.yaml"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb `sample`."""
    parser = subparsers.add_parser(
        "sample",
        help="unpack the shipped sample corpus with a tokenizer and a tiny model configuration",
        description=(
            "Write the shipped six-domain sample corpus, a sentencepiece tokenizer trained on it and the "
            "configuration of a tiny Llama model into FOLDER. Running it again changes nothing."
        ),
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default=DEFAULT_FOLDER,
        help="where to write; made when absent (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unpack into `args.folder`, print what was done, return the exit status 0."""
    from versatune_ds.apps.sample import unpack_sample

    report = unpack_sample(args.folder)
    if report.already_there:
        print(f"the sample is already in {report.folder}: all files are in place, nothing was written")
    else:
        print(f"sample unpacked into {report.folder}")
    for name in report.written:
        print(f"  wrote     {name}")
    for name in report.replaced:
        print(f"  replaced  {name} (it differed from the shipped sample)")
    print(f"  tokenizer: {report.vocab_size:,} entries; model: {report.parameters:,} parameters")
    print(f"next: {NEXT_COMMAND}")
    return 0
