"""`versatune-ds plan`: does a run fit, and which settings fit best.

Memory per GPU and host and checkpoint size of a run (of all of a model, or of an adapter), from shapes alone;
not data, time or cost. Without --zero, --checkpointing and --offload the settings that fit with the least
extra work are chosen. Leaves with 1 when the run does not fit.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from versatune_ds.cli import at_least, place, place_text
from versatune_ds.foundations.constants import EXIT_FAILURE, EXIT_OK

DEFAULT_PACKS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=place_text, metavar="NAME|FOLDER", help="shape as in bench, or a folder"
    )
    what.add_argument("--config", type=place, metavar="FILE", help="take everything from a run's settings")
    add("--gpus", type=at_least(1), required=True, metavar="N")
    add("--gpu", required=True, metavar="NAME", help="h100-80g, a100-80g, ...")
    add("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="default: 8")
    add("--seq-len", type=at_least(1), metavar="T", help="batch.pack_len; default: 8192")
    add("--sequence-parallel", type=at_least(1), metavar="N", help="GPUs that share a pack; default: 1")
    add("--packs-per-step", type=at_least(1), metavar="N", help=f"default: {DEFAULT_PACKS} or a bit more")
    add("--dtype", choices=("bf16", "fp16", "fp32"))
    add("--zero", type=int, choices=(1, 2, 3), help="ZeRO stage")
    add("--checkpointing", metavar="off|all|selective|offload|N", help="recompute activations")
    add("--offload", choices=("none", "optimizer", "all"), help="to host memory")
    add("--adapter", choices=("lora", "dora", "qlora"), help="train one beside the model")
    add("--rank", type=at_least(1), metavar="N", help="of the adapter; default: 16")
    add("--host-gib", type=float, default=1024.0, metavar="X", help="memory of a node (1024)")
    add("--json", action="store_true", help="print JSON, in bytes")
    add("overrides", nargs="*", metavar="section.key=value", help="with --config")


def run(args: argparse.Namespace) -> int:
    from versatune_ds.apps.bench.shapes import find_shape
    from versatune_ds.apps.plan.gpus import find_gpu
    from versatune_ds.apps.plan.plan import Machine, as_text, make_plan
    from versatune_ds.apps.plan.setup import Setup, setup_fields
    from versatune_ds.config.load import load_config
    from versatune_ds.config.model import Adapter
    from versatune_ds.data.plan.balance import check_world_size
    from versatune_ds.engine.backend.ranks import count_groups
    from versatune_ds.engine.model.sequence import check_heads
    from versatune_ds.foundations.errors import ConfigError

    machine = Machine(gpu=find_gpu(args.gpu), gpus_per_node=args.gpus_per_node, host_gib=args.host_gib)
    model = args.model
    fields: dict[str, Any] = {"packs_per_step": -(-DEFAULT_PACKS // args.gpus) * args.gpus}
    if args.config is not None:
        config = load_config(args.config, args.overrides)
        fields, model = setup_fields(config), config.model.source
    chosen = {"zero_stage": args.zero, "checkpointing": _checkpointing(args), "offload": args.offload}
    if args.adapter is not None:
        fields["adapter"] = Adapter(kind=args.adapter)
    if args.rank is not None:
        if fields.get("adapter") is None:
            raise ConfigError(f"--rank {args.rank} is of an adapter: give --adapter too")
        fields["adapter"] = fields["adapter"].model_copy(update={"rank": args.rank})
    sizes = {
        "pack_len": args.seq_len,
        "packs_per_step": args.packs_per_step,
        "sequence_parallel": args.sequence_parallel,
        "dtype": args.dtype,
    }
    fields |= {key: value for key, value in {**chosen, **sizes}.items() if value is not None}
    setup, shape = Setup(**fields, gpus=args.gpus), find_shape(model)
    sharing = setup.sequence_parallel
    check_world_size(setup.packs_per_step, count_groups(args.gpus, sharing), sharing)
    check_heads(shape.heads, sharing)
    search = args.config is None and all(value is None for value in chosen.values())
    plan = make_plan(shape, setup, machine, search=search)
    print(json.dumps(plan, indent=2) if args.json else as_text(plan))
    return EXIT_FAILURE if plan["verdict"] == "does not fit" else EXIT_OK


def _checkpointing(args: argparse.Namespace) -> str | int | None:
    from versatune_ds.config.model import Recompute
    from versatune_ds.foundations.errors import ConfigError

    text, policies = args.checkpointing, get_args(Recompute)
    if text is None or text in policies:
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(
        f"--checkpointing {text}: give {', '.join(policies)}, or every how many layers to recompute one"
    )
