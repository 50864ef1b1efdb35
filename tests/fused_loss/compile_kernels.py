"""Compile our Triton kernels for GPUs that need not be here, and print what came out as JSON.

A process of its own, because Triton's interpreter, which the tests use, replaces its compiler.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from versatune_kernels import triton_backend, triton_kernels

VOCAB_SIZE = 152064
PLAIN = dict(HAS_TOKEN_WEIGHT=False, HAS_SMOOTHING=False, HAS_SOFTCAP=False, TRAINING=True)
EVERYTHING = dict(HAS_TOKEN_WEIGHT=True, HAS_SMOOTHING=True, HAS_SOFTCAP=True, TRAINING=True)
ROW_TYPES = {
    "labels_ptr": "*i64",
    "ignore_index": "i32",
    "logits_stride": "i32",
    "grad_stride": "i32",
    **dict.fromkeys(["z_loss", "label_smoothing", "logit_scale", "softcap"], "fp32"),
    **dict.fromkeys(["token_weight_ptr", "factor_ptr", "nll_ptr", "objective_ptr"], "*fp32"),
}


def main() -> None:
    built = []
    for capability in (80, 90, 100):
        for logits, grad, flags in (("fp32", "bf16", PLAIN), ("bf16", "bf16", EVERYTHING)):
            types = {**ROW_TYPES, "logits_ptr": f"*{logits}", "grad_ptr": f"*{grad}"}
            constants = {**flags, "VOCAB_SIZE": VOCAB_SIZE, "TILE": triton_backend.VOCAB_TILE}
            built.append(build(triton_kernels.row_kernel, types, constants, capability, 8))
        types = dict(values_ptr="*fp32", labels_ptr="*i64", ids_ptr="*i32", num_tokens="i32")
        types.update(sums_ptr="*fp64", counts_ptr="*i64", squares_ptr="*fp64", ignore_index="i32")
        constants = {"TILE": triton_backend.TOKEN_TILE}
        built.append(build(triton_kernels.segment_kernel, types, constants, capability, 4))
        for gradient, in_place, count in (("fp32", False, "i32"), ("bf16", True, "i64")):
            types = dict(gradient_ptr=f"*{gradient}", out_ptr="*bf16", num_elements=count)
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
    ptx = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]
    accesses = re.findall(r"bar\.sync|(?:ld|st)\.global[.\w]*", ptx)
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "local_memory": ".local" in ptx,
        "loads_16_bytes": any(a.startswith("ld.global") and ".v4.b32" in a for a in accesses),
        "barrier_between_load_and_store": kernel.__name__ == "row_kernel" and guarded(accesses),
    }


def guarded(accesses):
    """Whether a barrier stands between the last vector load and the vector store that follows it."""
    last = [i for i, a in enumerate(accesses) if a.startswith("ld.global") and ".v" in a][-1]
    after = [a for a in accesses[last:] if a == "bar.sync" or (a.startswith("st") and ".v" in a)]
    return after[0] == "bar.sync" and len(after) > 1


main()
