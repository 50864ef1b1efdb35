"""Section `model`: what is trained, whole or through an adapter, and how it computes.

What is not covered: whether a model of this kind can be trained (`engine/model/families.py`), and whether its
settings work on this machine (`engine/preflight`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from versatune_ds.config.section import PlaceText, Section

Recompute = Literal["off", "all", "selective", "offload"]


class Adapter(Section):
    """A small trained part beside the frozen model, through peft (extra `adapter`; docs/adapters.md)."""

    kind: Literal["lora", "dora", "qlora"] = "lora"
    """`lora`: W + (alpha / rank) B A. `dora`: the rows of that sum get trained lengths, too. `qlora`: lora
    over a model held in 4 bits (bitsandbytes; CUDA, ZeRO stage 0 to 2)."""
    rank: int = Field(16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the product, times the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of A that is left out in training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules by the last part of their names, e.g. [q_proj, v_proj]; `all-linear`: all but the head, of a
    mixture of experts those of its attention."""
    start_from: PlaceText | dict[PlaceText, float] | None = None
    """Adapter folder to go on from, or several, each with its factor in their sum; `rank` is then the sum of
    their ranks. None: a new adapter."""

    @property
    def started(self) -> dict[str, float]:
        """Folder of `start_from` -> its factor."""
        given = self.start_from
        return given if isinstance(given, dict) else {given: 1.0} if given else {}

    def problems(self) -> Iterator[str]:
        heads = [name for name in self.targets if name in ("lm_head", "embed_tokens")]
        if heads:
            yield f"targets: {heads[0]} cannot have an adapter: the loss takes the head's weight"


class KLToBase(Section):
    """KL regularisation to the base model (docs/train.md, "Forgetting without data")."""

    coefficient: float = Field(gt=0)
    """Factor of the mean of KL(base || model) over the compared tokens, in nats, in the loss."""
    share: float = Field(0.25, gt=0, le=1)
    """Share of a step's samples whose supervised tokens are compared; the base's forward costs as much."""


class Yarn(Section):
    """Positions beyond those that a model was made for (YaRN, arXiv 2309.00071), as its card asks."""

    factor: float = Field(gt=1)
    """How many times as many."""
    original_max_position_embeddings: int = Field(ge=1)
    """Positions that it was made for."""


class Model(Section):
    """The model, its tokenizer and how it computes."""

    source: PlaceText
    """Folder or hub name of a causal LM (docs/train.md has the families), or of a model of images and text,
    whose text part is then trained. What would be trained wrongly is refused."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random`: build from `source`'s config.json only and initialise with `run.seed`."""
    tokenizer: PlaceText | None = None
    """Folder or hub name of the tokenizer; default: `source`."""
    adapter: Adapter | None = None
    """Train an adapter and leave the model as it is. None: train all of it."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision; the optimizer keeps fp32 master weights (or see `optimizer.states`)."""
    yarn: Yarn | None = None
    """Stretch the model's RoPE; written into the export's config.json. None: as its configuration says."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = "auto"
    """Attention for packs. `auto`: on CUDA flash-attn or torch's varlen kernel, else sdpa (docs/train.md)."""
    activation_checkpointing: Recompute | Annotated[int, Field(ge=1, strict=True)] = "off"
    """Recompute activations in backward: for no layer, every layer, or every n-th layer. `selective`: all but
    matrix products and attention. `offload`: every layer, from its input in host memory (docs/train.md)."""
    loss_backend: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """Implementation of the fused linear + cross-entropy. `auto`: triton on CUDA, else chunked."""
    logits_dtype: Literal["fp32", "compute"] = "fp32"
    """`compute`: logits in `dtype`, half the memory a larger error (docs/train.md); triton only."""
    objective: Literal["cross_entropy", "dft"] = "cross_entropy"
    """`dft`: each token's loss times its own probability, as a constant (arXiv:2508.05629). All losses in
    logs, weights and evaluations stay cross-entropies."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Add uniform noise of +-alpha / sqrt(L d) to the embeddings in training (arXiv:2310.05914): L the tokens
    of a sample, d the hidden size. None: none."""
    kl_to_base: KLToBase | None = None
    """Hold the model near what it was: add a KL term to its base, which is the same model with its adapter
    switched off, or without an adapter a frozen second copy. None: none."""
    liger: Literal["auto", "off"] = "auto"
    """`auto`: on CUDA, RMSNorm, SwiGLU and RoPE of liger-kernel if it is installed. Never its loss."""
    compile: Literal["off", "layers"] = "off"
    """`layers`: torch.compile for each decoder layer; the first steps are slow."""
    router: Literal["train", "frozen"] = "train"
    """Mixtures of experts. `frozen`: routers keep their weights, and their balance loss is only reported."""
    router_aux_loss: float | None = Field(default=None, ge=0)
    """Factor of the routers' balance loss; default: the model's own `router_aux_loss_coef`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""

    @property
    def compared_share(self) -> float:
        """`kl_to_base.share`; 0: none."""
        return self.kl_to_base.share if self.kl_to_base else 0.0

    @property
    def keeps_base(self) -> bool:
        """Whether a frozen copy of the model stands beside the one that is trained."""
        return self.kl_to_base is not None and self.adapter is None

    def problems(self) -> Iterator[str]:
        if self.compile != "off" and self.activation_checkpointing in ("selective", "offload"):
            yield f"compile cannot trace activation_checkpointing {self.activation_checkpointing}"
        if self.keeps_base and self.router == "frozen":
            yield (
                "kl_to_base without an adapter keeps frozen weights out of checkpoints, and those of routers "
                "are needed there: take router: frozen out, or give model.adapter"
            )
        if self.kl_to_base is not None and self.neftune_alpha is not None:
            yield "kl_to_base would compare noise: take neftune_alpha out, or kl_to_base"
