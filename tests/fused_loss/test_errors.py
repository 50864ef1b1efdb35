"""Wrong input is a KernelError that says what was found and what to do."""

import subprocess
import sys

import pytest
import torch

from versatune_kernels import KernelError, backends, linear_cross_entropy, resolve_backend
from versatune_kernels.checks import ValueChecks


def _call(**changes):
    arguments = dict(
        hidden=torch.zeros(6, 4),
        weight=torch.zeros(10, 4),
        labels=torch.zeros(6, dtype=torch.int64),
    )
    return linear_cross_entropy(**{**arguments, **changes})


ZEROS = torch.zeros(6, dtype=torch.int64)
BAD_CALLS = {
    "label V": (
        dict(labels=torch.tensor([0, 1, 10, 0, 0, 10])),
        r"label 10 of token 2.*0\.\.9.*2 such",
    ),
    "label -1": (dict(labels=ZEROS - 1), r"label -1 of token 0.*not ignore_index"),
    "label 2^32": (dict(labels=ZEROS + 2**32), "label 4294967296 "),
    "label -100 of another ignore_index": (dict(labels=ZEROS - 100, ignore_index=-1), "label -100"),
    "float labels": (dict(labels=torch.zeros(6)), "labels is torch.float32; allowed: int32, int64"),
    "list labels": (dict(labels=[0] * 6), "labels is a list"),
    "too few labels": (
        dict(labels=torch.zeros(5, dtype=torch.int64)),
        r"labels has shape \[5\].*\[6\]",
    ),
    "hidden [H]": (dict(hidden=torch.zeros(4)), r"hidden has shape \[4\]"),
    "other H": (dict(hidden=torch.zeros(6, 5)), "5 features and weight 4"),
    "transposed weight": (dict(weight=torch.zeros(4, 10)), r"as nn.Linear stores it"),
    "partitioned weight": (dict(weight=torch.zeros(0)), "ZeRO-3"),
    "dtype mismatch": (
        dict(hidden=torch.zeros(6, 4).bfloat16()),
        "hidden is torch.bfloat16 but weight",
    ),
    "float64": (dict(hidden=torch.zeros(6, 4).double()), "allowed: bfloat16, float16, float32"),
    "device": (
        dict(weight=torch.zeros(10, 4, device="meta")),
        "hidden is on cpu but weight on meta",
    ),
    "labels on another device": (
        dict(labels=ZEROS.to("meta")),
        "labels is on meta but hidden on cpu",
    ),
    "no num_samples": (dict(sample_ids=ZEROS), "sample_ids without num_samples"),
    "no sample_ids": (dict(num_samples=2), "num_samples=2 without sample_ids"),
    "negative num_samples": (dict(sample_ids=ZEROS, num_samples=-1), "num_samples=-1"),
    "sample id too large": (
        dict(sample_ids=ZEROS + 3, num_samples=3),
        r"holds 3 at token 0.*0\.\.2",
    ),
    "ids of another shape": (dict(sample_ids=ZEROS[:3], num_samples=1), "sample_ids has shape"),
    "boolean ids": (dict(sample_ids=ZEROS > 0, num_samples=1), "sample_ids is torch.bool"),
    "num_valid too small": (dict(num_valid=5), "num_valid=5, but 6 labels"),
    "num_valid too large": (dict(num_valid=7), "num_valid=7 for 6 tokens"),
    "num_valid a float": (dict(num_valid=6.0), "num_valid=6.0"),
    "negative normalizer": (dict(normalizer=-1.0), "normalizer=-1.0"),
    "NaN normalizer": (dict(normalizer=float("nan")), "normalizer=nan"),
    "negative tensor": (dict(normalizer=torch.tensor(-2.0)), "normalizer=-2.0"),
    "NaN tensor": (dict(normalizer=torch.tensor(float("nan"))), "normalizer=nan"),
    "vector normalizer": (dict(normalizer=torch.ones(2)), "expected one number"),
    "text normalizer": (dict(normalizer="12"), "normalizer='12'"),
    "learnt normalizer": (dict(normalizer=torch.ones((), requires_grad=True)), "detach"),
    "learnt token_weight": (dict(token_weight=torch.ones(6, requires_grad=True)), "detach"),
    "integer token_weight": (dict(token_weight=ZEROS), "token_weight is torch.int64"),
    "scale 0": (dict(logit_scale=0.0), "logit_scale=0.0"),
    "softcap": (dict(softcap=float("inf")), "softcap=inf"),
    "ignore_index": (dict(ignore_index=None), "ignore_index=None"),
    "chunk 0": (dict(chunk_tokens=0), "chunk_tokens=0"),
    "chunk text": (dict(chunk_tokens="big"), "chunk_tokens='big'"),
    "logits_dtype": (dict(logits_dtype="bf16"), "logits_dtype='bf16'. Known: 'fp32', and 'compute'"),
    "misspelt backend": (
        dict(backend="chunk"),
        "Known: auto, triton, chunked, reference.*Did you mean 'chunked'",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(KernelError, match=message):
        _call(**changes)


def test_the_unchanged_call_is_fine():
    assert _call().loss.item() == pytest.approx(6 * 2.302585)


def test_validation_can_be_switched_off():
    out = _call(sample_ids=ZEROS + 3, num_samples=3, validate=False)
    assert out.sample_loss.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(KernelError):
        _call(sample_ids=ZEROS + 3, num_samples=3, validate=True)


def test_values_are_checked_on_the_device_where_reading_them_would_wait():
    assert ValueChecks(None, torch.device("cpu")).mode == "host"
    on_cuda = ValueChecks(None, torch.device("cuda"))
    assert on_cuda.mode == "device"
    on_cuda.require(torch.tensor([True, True]), lambda: "never built")
    with pytest.raises(RuntimeError, match="validate=True"):
        on_cuda.require(torch.tensor([True, False]), lambda: "never built")
    assert ValueChecks(True, torch.device("cuda")).mode == "host"


def test_resolve_backend_names_its_reason():
    assert resolve_backend().name == "chunked"
    assert "needs CUDA" in resolve_backend("auto", "cpu").reason
    assert resolve_backend("chunked", "cuda").name == "chunked"
    assert resolve_backend("reference", "cuda").name == "reference"


@pytest.mark.parametrize(
    ("triton_problem", "gpu_problem", "name", "reason"),
    [
        (None, None, "triton", "CUDA and Triton are here"),
        ("Triton cannot be imported", None, "chunked", "Triton cannot be imported"),
        (None, "Tesla V100 is older than Ampere", "chunked", "older than Ampere"),
    ],
)
def test_auto_takes_triton_on_cuda_where_it_can(monkeypatch, triton_problem, gpu_problem, name, reason):
    monkeypatch.setattr(backends, "_triton_problem", lambda: triton_problem)
    monkeypatch.setattr(backends, "_gpu_problem", lambda: gpu_problem)
    chosen = resolve_backend("auto", "cuda")
    assert chosen.name == name and reason in chosen.reason
    if name == "triton":
        assert resolve_backend("triton", "cuda").name == "triton"
    else:
        with pytest.raises(KernelError, match=f"{reason}.*chunked"):
            resolve_backend("triton", "cuda")


def test_triton_on_the_cpu_is_for_its_interpreter_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelError, match=r"needs a CUDA device.*TRITON_INTERPRET=1"):
        resolve_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_triton_problem", lambda: "Triton cannot be imported (why)")
    with pytest.raises(KernelError, match=r"cannot be imported \(why\)"):
        resolve_backend("triton", "cpu")
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    assert "interpreter" in resolve_backend("triton", "cpu").reason


def test_a_missing_triton_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "versatune_kernels.triton_backend", None)
    assert "pip install 'triton" in str(backends._triton_problem.__wrapped__())


def test_the_package_stands_alone():
    """torch is all it imports: no trainer, no triton, no transformers."""
    code = (
        "import sys, versatune_kernels; "
        "print([m for m in ('versatune_ds', 'triton', 'transformers', 'deepspeed') "
        "if m in sys.modules])"
    )
    path = [p for p in sys.path if p]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
