"""The model: any causal LM of transformers, its head replaced by one that computes the loss.

Built under `zero.Init` when ZeRO-3 is on: each weight is partitioned as it is made, and pretrained values
come from rank 0, which alone reads them (docs/plan.md). The head module owns the output weight, because under
ZeRO-3 a weight exists only inside the forward of the module it belongs to; it reuses the very Parameter of
`lm_head`, so tied embeddings stay tied.

What is not covered: output layers with a bias, which are refused.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # zero.Init patches tensor constructors: dynamo must be loaded before it is entered
from torch import nn
from transformers import PreTrainedModel

from versatune_ds.config.model import Model
from versatune_ds.data.collate import Batch, Compared
from versatune_ds.engine.model.adapters import BaseHead, BaseKL, add_adapter
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.families import LogitRule, logit_rule
from versatune_ds.engine.model.noise import EmbeddingNoise, Place
from versatune_ds.engine.model.recompute import recompute_in_backward
from versatune_ds.engine.model.rope import rotate_by_sample, set_ends
from versatune_ds.engine.model.router import ROUTER, Routers, experts_of
from versatune_ds.engine.model.sequence import SequenceGroup
from versatune_ds.engine.model.source import four_bits, load_lm
from versatune_ds.engine.phases import LOSS, timed
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger
from versatune_kernels import LossOutput, linear_cross_entropy

log = get_logger(__name__)

LIGER_PARTS = ("rms_norm", "swiglu", "rope")
"""What `model.liger: auto` takes from liger-kernel, by the names of its switches."""


class LossHead(nn.Module):
    """Output projection and cross-entropy in one; owns the [V, H] weight.

    Args:
        weight: the model's output weight, the same Parameter object (tied or not, partitioned or not).
        backend: `model.loss_backend`.
        rule: what the model does to its logits.
        is_dft: whether `model.objective` is dft.
    """

    def __init__(
        self, weight: nn.Parameter, backend: str, logits_dtype: str, rule: LogitRule, is_dft: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.backend, self.logits_dtype, self.rule, self.is_dft = backend, logits_dtype, rule, is_dft

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        num_samples: int = 0,
        num_valid: int = 0,
        normalizer: float = 1.0,
        token_weight: torch.Tensor | None = None,
        extra: Callable[[torch.Tensor, torch.Tensor, LogitRule], torch.Tensor] | None = None,
    ) -> LossOutput | torch.Tensor:
        """Loss of a pack; without labels logits [..., V], for transformers' `generate`.

        `hidden` [T, H] (or [..., H]) is positional: ZeRO-3's release hook ignores keywords.

        Args:
            extra: a term of the loss that needs the weight, too.
        """
        if labels is None:
            return nn.functional.linear(hidden, self.weight)
        out = linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            sample_ids=sample_ids,
            num_samples=num_samples,
            num_valid=num_valid,
            normalizer=normalizer,
            token_weight=token_weight,
            logit_scale=self.rule.scale,
            softcap=self.rule.softcap,
            logits_dtype=self.logits_dtype,
            by_probability=self.is_dft,
            backend=self.backend,
        )
        if extra is None:
            return out
        return out._replace(loss=out.loss + extra(hidden, self.weight, self.rule))


class PackedCausalLM(nn.Module):
    """A causal LM that takes a pack and gives its loss; what DeepSpeed wraps.

    Args:
        lm: the transformers model; its `lm_head` becomes a `LossHead`.
        liger: what `apply_liger` did.
        sequence: the ranks that share a pack; then `lm` attends by `sequence.share_heads`.
        is_dft: whether `model.objective` is dft.
        base: the model before training, which `base_kl` compares with; None: `lm` without its adapter.

    Raises:
        ConfigError: an output layer or a change of the logits that the loss cannot follow.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        loss_backend: str,
        liger: str = "off",
        logits_dtype: str = "fp32",
        routers: Routers | None = None,
        sequence: SequenceGroup | None = None,
        is_dft: bool = False,
        noise: EmbeddingNoise | None = None,
        base_kl: BaseKL | None = None,
        base: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.liger, self.routers, self.sequence, self.noise = liger, routers, sequence, noise
        self.base_kl, self.is_compiled = base_kl, False
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ConfigError(f"the model's output layer is {head!r}; a linear layer without bias is needed")
        self.tied = lm.get_input_embeddings().weight is head.weight
        rule = logit_rule(lm.config)
        lm.set_output_embeddings(LossHead(head.weight, loss_backend, logits_dtype, rule, is_dft))
        self.lm: Any = lm
        self.base: Any = base
        if base is not None:
            base.requires_grad_(False)
            base.set_output_embeddings(BaseHead(base.get_output_embeddings().weight))
        self.rotary: list[Any] = rotate_by_sample(self)

    @property
    def layers(self) -> list[Any]:
        return list(self.lm.base_model.layers)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All but those of `base`; a tied one once, under its first name."""
        return (named for named in self.named_parameters() if not named[0].startswith("base."))

    def compile_layers(self) -> None:
        """Compile what each layer computes, not the hooks around it; equal layers share the code."""
        for layer in [*self.layers, *(self.base.base_model.layers if self.base is not None else ())]:
            layer.forward = torch.compile(layer.forward)
        self.is_compiled = True

    @staticmethod
    def body(
        lm: Any,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        **options: Any,
    ) -> Any:
        """transformers' output of `lm` for a pack, samples kept apart.

        No attention mask and no cache: only then does transformers isolate samples by their position ids.
        """
        return lm.base_model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            **options,
        )

    def base_hidden(self, compared: Compared) -> torch.Tensor:
        """[n, H]: what the base makes of the compared tokens; without gradient."""
        assert self.base_kl is not None
        batch, lm = compared.batch, self.lm if self.base is None else self.base
        set_ends(self.rotary, batch.cu_seqlens, len(batch.input_ids), None)
        with self.base_kl.base(lm.base_model):
            body = self.body(lm, batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
            hidden: torch.Tensor = body.last_hidden_state.squeeze(0)[compared.own_rows]
        return hidden

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        sample_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        num_samples: int,
        num_valid: int,
        normalizer: float,
        token_weight: torch.Tensor | None = None,
        passes: float = 1,
        parts: int = 1,
        place: Place = (0, 0, 0, 1),
        compared: Compared | None = None,
    ) -> LossOutput:
        """Loss of one pack (see `data.collate.Batch` for shapes), divided by `normalizer`.

        Args:
            token_weight: floating [T]. Factor of each token in the loss, not in the sums; None: 1.
            passes: packs of a step on this rank, over which the routers' loss is averaged; a fraction of
                them where ranks share packs.
            parts: ranks that share the pack. Of more than one, the loss is that of this rank's rows, and the
                sums of samples are the pack's.
            place: the pack's; noise is drawn by it.
            compared: samples whose KL to the base is added to the loss.
        """
        term = None
        if compared is not None and self.base_kl is not None:
            own_head = None if self.base is None else self.base.get_output_embeddings()
            of_base = (self.base_hidden(compared), own_head)
            term = functools.partial(self.base_kl.term, compared, sample_ids, *of_base)
        if self.noise is not None and self.training:
            self.noise.prepare(sample_ids, num_samples, place)
        routers = self.routers if self.training else None
        options: dict[str, Any] = {} if routers is None else {"output_router_logits": True}
        group = self.sequence if parts > 1 else None
        if self.sequence is not None:
            options["sequence_group"] = group
        set_ends(self.rotary, cu_seqlens, len(input_ids), group and group.rank)
        body = self.body(self.lm, input_ids, position_ids, cu_seqlens, max_seqlen, **options)
        hidden = body.last_hidden_state.squeeze(0)
        head = self.lm.get_output_embeddings()
        with timed(LOSS):
            out: LossOutput = head(
                hidden, labels, sample_ids, num_samples, num_valid, normalizer, token_weight, term
            )
        if routers is not None:
            extra = routers.observe(body.router_logits, sample_ids >= 0, group)
            out = out._replace(loss=out.loss + extra / passes)
        return out if group is None else group.whole_samples(out)


def build_model(
    settings: Model,
    attention: AttentionChoice,
    seed: int,
    device_type: str = "cpu",
    sequence: SequenceGroup | None = None,
) -> PackedCausalLM:
    """Build the model, pretrained or random; every rank calls it.

    Under ZeRO-3 the caller keeps a `transformers.integrations.HfDeepSpeedConfig` alive; transformers then
    partitions each weight as it is made.

    Args:
        seed: of random initialisation and noise; ranks must use the same.
        device_type: "cpu" or "cuda", where the model will run.

    Raises:
        ConfigError: it cannot be built, or a pretrained folder lacks weights or holds others.
    """
    options = {"attn_implementation": attention.implementation, **four_bits(settings)}
    # together: under ZeRO-3 only rank 0 reads the values
    lm = distributed.together(lambda: load_lm(settings, seed, **options))
    base = None
    if settings.keeps_base:
        base = distributed.together(lambda: load_lm(settings, seed, **options))
    lm.config.use_cache = False
    lm.config.architectures = [type(lm).__name__]
    if settings.adapter is not None:
        add_adapter(lm, settings.adapter, seed)
    # Liger's RoPE turns the product in place: kept, it would be turned again
    kept_whole = ("rope",) if settings.activation_checkpointing == "selective" else ()
    liger = apply_liger(lm, settings.liger, device_type, kept_whole)
    if base is not None:
        apply_liger(base, settings.liger, device_type, kept_whole)
    recompute_in_backward(lm, settings.activation_checkpointing)
    routers = None
    if experts_of(lm.config):
        frozen = settings.router == "frozen" or settings.adapter is not None
        routers = Routers(lm.config, 0.0 if frozen else settings.router_aux_loss)
        for name, parameter in lm.named_parameters():
            if settings.router == "frozen" and name.endswith(ROUTER):
                parameter.requires_grad_(False)
    noise = None
    if settings.neftune_alpha is not None:
        noise = EmbeddingNoise(lm.get_input_embeddings(), settings.neftune_alpha, seed)
    base_kl = BaseKL(settings.kl_to_base.coefficient) if settings.kl_to_base else None
    how = (settings.loss_backend, liger, settings.logits_dtype)
    return PackedCausalLM(lm, *how, routers, sequence, settings.objective == "dft", noise, base_kl, base)


def liger_problem(choice: str, device_type: str) -> str | None:
    """Why `model.liger` is not used on "cpu" or "cuda", or None when it is (for models that it knows)."""
    if choice == "off":
        return "asked for"
    if device_type != "cuda":
        return "needs CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def apply_liger(lm: PreTrainedModel, choice: str, device_type: str, left_out: tuple[str, ...] = ()) -> str:
    """Put liger-kernel's RMSNorm, SwiGLU and RoPE into a model, as far as it has them; never its loss.

    Liger replaces RoPE for all models of that architecture in the process, the others in `lm` only.

    Args:
        choice: `model.liger`.
        left_out: of `LIGER_PARTS`, what stays as it is.
        device_type: "cpu" or "cuda".

    Returns:
        What was done, for the log.
    """
    problem = liger_problem(choice, device_type)
    if problem is not None:
        return f"off ({problem})"
    from liger_kernel.transformers import monkey_patch

    model_type = lm.config.model_type
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is None:
        return f"off (liger-kernel has no kernels for {model_type})"
    parameters = inspect.signature(patch).parameters
    # its SwiGLU of experts is for lists of them
    unwanted = {*left_out, *(("swiglu",) if experts_of(lm.config) else ())}
    wanted = [part for part in LIGER_PARTS if part not in unwanted]
    switches = {name: name in wanted for name, p in parameters.items() if isinstance(p.default, bool)}
    patch(model=lm, **switches)
    parts = ", ".join(part for part in wanted if part in switches)
    return f"{parts} (liger-kernel {importlib.metadata.version('liger-kernel')})"


def model_inputs(
    batch: Batch, normalizer: float, passes: float = 1, place: Place = (0, 0, 0, 1)
) -> dict[str, Any]:
    """Keyword arguments of `PackedCausalLM.forward` for a batch on the model's device."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "labels": batch.labels,
        "sample_ids": batch.sample_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "num_samples": len(batch.sample_domains),
        "num_valid": batch.supervised_tokens,
        "normalizer": normalizer,
        "passes": passes,
        "place": place,
        "token_weight": batch.token_weight,
        "parts": batch.parts,
        "compared": batch.compared,
    }


def float32_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point buffers (rotary frequencies) before DeepSpeed casts the module."""
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.dtype == torch.float32
    }


def restore_buffers(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Put `float32_buffers` back: rotary frequencies in bf16 would blur positions beyond a few hundred."""
    for name, value in buffers.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, value.to(getattr(module, attribute).device))
