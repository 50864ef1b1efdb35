"""Compile our Triton kernels for GPUs that need not be here, and print what came out as JSON.

A process of its own, because Triton's interpreter, which the tests use, replaces its compiler. Start it with
TRITON_DUMP_PTXAS_LOG=1, TRITON_INTERPRET=0 and an empty TRITON_CACHE_DIR: registers and spills are what the
assembler says while it works.
"""

import contextlib
import io
import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from versatune_kernels import triton_backend, triton_kernels

VOCAB_SIZES = (32001, 50257, 128257, 151936, 152064)
PLAIN = dict(HAS_TOKEN_WEIGHT=False, HAS_SOFTCAP=False, BY_PROBABILITY=False, TRAINING=True)
EVERYTHING = dict(HAS_TOKEN_WEIGHT=True, HAS_SOFTCAP=True, BY_PROBABILITY=True, TRAINING=True)
ROWS = (("fp32", "bf16", PLAIN), ("bf16", "bf16", EVERYTHING), ("fp32", "fp32", EVERYTHING))
"""Types of logits and gradient, and switches, for every vocabulary."""
MORE_ROWS = (("fp32", "fp16", EVERYTHING), ("fp32", "bf16", {**EVERYTHING, "TRAINING": False}))
"""For the last vocabulary only."""
SCALES = (("fp32", "bf16", False, "i32"), ("bf16", "bf16", True, "i64"), ("fp32", "fp16", False, "i64"))
"""Types of gradient and result, whether in place, and type of the count."""
USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
ROW_TYPES = {
    "labels_ptr": "*i64",
    "ignore_index": "i32",
    "logits_stride": "i32",
    "grad_stride": "i32",
    **dict.fromkeys(["logit_scale", "softcap"], "fp32"),
    **dict.fromkeys(["token_weight_ptr", "factor_ptr", "nll_ptr", "objective_ptr"], "*fp32"),
}


def main() -> None:
    built = []
    for capability in (80, 90, 100):
        for vocab_size in VOCAB_SIZES:
            for logits, grad, flags in ROWS + MORE_ROWS * (vocab_size == VOCAB_SIZES[-1]):
                types = {**ROW_TYPES, "logits_ptr": f"*{logits}", "grad_ptr": f"*{grad}"}
                tile = triton_backend.VOCAB_TILE
                constants = {**flags, "VOCAB_SIZE": vocab_size, "TILE": tile}
                constants["LANES"] = tile // triton_backend.TILE_ROWS
                built.append(build(triton_kernels.row_kernel, types, constants, capability, 8))
        for labels, has_both in (("i64", True), ("i32", False)):
            types = dict.fromkeys(["labels_ptr", "ids_ptr"], f"*{labels}") | {"normalizer_ptr": "*fp64"}
            types |= dict.fromkeys(["index_ptr", "kept_labels_ptr"], "*i64")
            fp32 = ["token_weight", "kept_weight", "inverse", "nonzero", "holds"]
            types |= dict.fromkeys([f"{name}_ptr" for name in fp32], "*fp32")
            numbers = ["num_tokens", "num_rows", "ignore_index", "vocab_size", "num_segments"]
            types |= dict.fromkeys(numbers, "i32")
            constants = dict(HAS_IDS=has_both, HAS_TOKEN_WEIGHT=has_both, TILE=triton_backend.TOKEN_TILE)
            built.append(build(triton_kernels.tokens_kernel, types, constants, capability, 4))
        types = dict(values_ptr="*fp32", labels_ptr="*i64", ids_ptr="*i32", num_tokens="i32")
        types.update(sums_ptr="*fp64", counts_ptr="*i64", squares_ptr="*fp64", ignore_index="i32")
        constants = {"TILE": triton_backend.TOKEN_TILE}
        built.append(build(triton_kernels.segment_kernel, types, constants, capability, 4))
        for gradient, result, in_place, count in SCALES:
            types = dict(gradient_ptr=f"*{gradient}", out_ptr=f"*{result}", num_elements=count)
            types.update(upstream_ptr="*fp32", pending_ptr="*fp32")
            constants = {"IN_PLACE": in_place, "TILE": triton_backend.SCALE_TILE}
            built.append(build(triton_kernels.scale_kernel, types, constants, capability, 8))
    print(json.dumps(built))


def build(kernel, types, constants, capability, num_warps):
    """Compile with pointers and strides known to be multiples of 16, as those of large tensors are."""
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): aligned
            for i, name in enumerate(names)
            if name.endswith(("ptr", "stride", "num_elements")) and name in types
        },
    )
    target = GPUTarget("cuda", capability, 32)
    with contextlib.redirect_stdout(io.StringIO()) as assembler:  # TRITON_DUMP_PTXAS_LOG
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    stack, *spills = map(int, USAGE.search(assembler.getvalue()).groups())
    accesses = re.findall(r"bar\.sync|(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "vocab_size": constants.get("VOCAB_SIZE"),
        "types": [types[name] for name in names if types.get(name, "").startswith("*")][:2],
        "training": constants.get("TRAINING"),
        "registers": int(re.search(r"Used (\d+) registers", assembler.getvalue()).group(1)),
        "shared_bytes": compiled.metadata.shared,
        "local_bytes": stack + sum(spills),
        "loads_16_bytes": any(a.startswith("ld.global") and ".v4.b32" in a for a in accesses),
        "barrier_between_load_and_store": guarded(accesses),
    }


def guarded(accesses):
    """Whether a barrier stands between the last load from global memory and the store that follows it."""
    last = [i for i, a in enumerate(accesses) if a.startswith("ld.global")][-1]
    after = [a for a in accesses[last:] if a == "bar.sync" or a.startswith("st")]
    return bool(after) and after[0] == "bar.sync" and len(after) > 1


main()
