"""The shape of a decoder: parameter counts and FLOPs, without building it.

With H hidden, M MLP width, d head size, n and k query and key-value heads, a layer holds attention
2 H n d + 2 H k d, MLP 3 H M, and vectors: its norms and biases (`families.py` says which). In a mixture
experts take the MLP's place, and the experts that a token does not reach do not count as N or N_all in FLOPs.

FLOPs in two conventions, because numbers of other trainers are mostly in the second. The strict one counts
useful work only. A step of T real tokens, S of them supervised, in samples of lengths L_i costs

    6 N T                       linear layers, forward and backward (N: parameters outside embedding and head)
  + 6 H V S                     the head, on the positions that have a label
  + 6 n_layers A sum_i L_i^2    attention scores and values, the causal half (A: heads x head size)

With an adapter of N_a parameters beside a frozen model, only the adapter's weights have products for their
gradients: 4 N + 6 N_a take the place of 6 N, 4 H V that of 6 H V, and in the common convention
4 N_all + 6 N_a that of 6 N_all. (The lengths of DoRA's rows are computed once a pack and not counted.)

Padding is not counted, nor recomputation unless asked for; the embedding look-up is no matrix product. Per
layer, scores and values are two products of 2 A L^2 FLOPs forward, the causal half of that is 2 A L^2, and
backward is twice forward: 6 A L^2.

The common one (PaLM, arXiv 2204.02311, appendix B, and after it most papers and trainers) counts for every
slot token, padding and positions without a label included, in packs of P tokens

    6 N_all + 12 n_layers A P     N_all: all parameters, the embedding included (a tied matrix once)

as if each token attended to the whole pack, in both directions. It is the larger number of the two: packs
hold several samples, attention is causal, and the embedding multiplies nothing. Some (torchtitan) leave the
embedding out of N_all, so a number from elsewhere is compared with neither before its formula is known.
Worked: 8B (N_all 8.03e9, 32 layers, A 4096) in full samples of 4,096 tokens, 10,471 tokens/s on an H200, is
57.8 % in the common convention (54.6 GFLOPs a token) and 51.1 % in the strict one (48.2).

What is not covered: sliding-window attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from versatune_ds.config.model import Adapter
from versatune_ds.foundations.errors import ConfigError, unknown_name


class Linear(NamedTuple):
    """A kind of linear layer that an adapter can stand beside."""

    source: str
    """What goes in; some kinds share it."""
    width: int
    """Of what goes in."""
    out: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Of a mixture: E experts of 3 H m parameters and a router of E H in a layer."""

    count: int
    """E."""
    active: int
    """Experts of a token."""
    mlp: int
    """m: width of one."""
    layers: int
    """Layers that have them; the others have an MLP."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory and FLOPs of a decoder depend on; widths in elements."""

    family: str
    """transformers' `model_type`."""
    hidden: int
    """H."""
    mlp: int
    """M."""
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    """V: rows of the head."""
    tied: bool
    """Embedding and head are one matrix."""
    vectors: tuple[int, ...]
    """Sizes of a layer's norms and biases."""
    experts: Experts | None = None
    norms: int = 2
    """Norms of the hidden states in a layer."""
    fp32_norms: bool = False
    """They are scaled in fp32."""
    query_key_norms: bool = False
    """Norms of q and k."""
    joined: bool = False
    """q, k and v are one matrix, gate and up another."""
    counted: tuple[int, int] | None = None
    """Parameters of the built model: all, and all but embedding and head. None: by formula."""
    trained: int | None = None
    """N_a: parameters of the adapter beside the model, which is frozen. None: all of the model is trained."""

    @property
    def query_width(self) -> int:
        """A: query heads times head size."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Key-value heads times head size."""
        return self.kv_heads * self.head_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, by formula; of one with experts, if there is any."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + (self._expert_parameters or self._mlp_parameters) + sum(self.vectors)

    @property
    def _mlp_parameters(self) -> int:
        return 3 * self.hidden * self.mlp

    @property
    def _expert_parameters(self) -> int:
        """Of a layer's experts and router; 0: it has none."""
        return self.experts.count * self.hidden * (3 * self.experts.mlp + 1) if self.experts else 0

    @property
    def idle_parameters(self) -> int:
        """Parameters of experts that a token does not reach."""
        if self.experts is None:
            return 0
        idle = self.experts.count - self.experts.active
        return self.experts.layers * idle * 3 * self.hidden * self.experts.mlp

    @property
    def head_parameters(self) -> int:
        """Parameters of the head (and, as many, of an embedding of its own)."""
        return self.hidden * self.vocab

    @property
    def nonembedding_parameters(self) -> int:
        """N: all parameters but embedding and head, i.e. the layers and the last norm."""
        if self.counted:
            return self.counted[1]
        dense = self.layers - self.experts.layers if self.experts else 0
        other = dense * (self._mlp_parameters - self._expert_parameters)
        return self.layers * self.layer_parameters + other + self.hidden

    @property
    def parameters(self) -> int:
        """N_all: all parameters, a tied matrix once."""
        if self.counted:
            return self.counted[0]
        return self.nonembedding_parameters + self.head_parameters * (1 if self.tied else 2)

    @property
    def linears(self) -> dict[str, Linear]:
        """By the last part of their names; of a mixture those of its attention."""
        query, key, hidden = self.query_width, self.kv_width, self.hidden
        qkv, gates = (
            {"q_proj": query, "k_proj": key, "v_proj": key},
            {"gate_proj": self.mlp, "up_proj": self.mlp},
        )
        if self.joined:
            qkv, gates = {"qkv_proj": query + 2 * key}, {"gate_up_proj": 2 * self.mlp}
        found = {name: Linear("attention norm", hidden, out) for name, out in qkv.items()}
        found["o_proj"] = Linear("attention", query, hidden)
        if self.experts is None:
            found |= {name: Linear("mlp norm", hidden, out) for name, out in gates.items()}
            found["down_proj"] = Linear("mlp", self.mlp, hidden)
        return found

    def targets(self, adapter: Adapter | None) -> list[Linear]:
        """The kinds that have an adapter; ConfigError for a target that the model has not."""
        known = self.linears
        names = () if adapter is None else known if adapter.targets == "all-linear" else adapter.targets
        for name in names:
            if name not in known:
                raise ConfigError(f"model.adapter.targets: {unknown_name('kind of layer', name, known)}")
        return [known[name] for name in names]

    def step_flops(
        self,
        *,
        real_tokens: float,
        supervised_tokens: float,
        sum_squared_lengths: float,
        recomputed: float = 0.0,
    ) -> float:
        """FLOPs of useful work of one optimizer step over all ranks; the first formula of the module's text.

        Args:
            real_tokens: tokens of samples, without padding.
            supervised_tokens: positions with a label.
            sum_squared_lengths: sum over samples of their length in tokens squared.
            recomputed: share of the layers whose forward is computed twice.
        """
        again = 2.0 * recomputed
        reached = self.nonembedding_parameters - self.idle_parameters
        linear = ((self._per_weight + again) * reached + (6.0 + again) * (self.trained or 0)) * real_tokens
        head = self._per_weight * self.head_parameters * supervised_tokens
        attention = (6.0 + again) * self.layers * self.query_width * sum_squared_lengths
        return linear + head + attention

    @property
    def _per_weight(self) -> float:
        """FLOPs of a token for a weight of the model: forward, the gradient of its input and its own."""
        return 6.0 if self.trained is None else 4.0

    def step_flops_6n(self, *, slot_tokens: float, pack_len: int) -> float:
        """FLOPs of one optimizer step over all ranks as most papers count; the second formula.

        Args:
            slot_tokens: tokens of all packs, padding included.
            pack_len: tokens of one pack.
        """
        attention = 12.0 * self.layers * self.query_width * pack_len
        weights = self._per_weight * (self.parameters - self.idle_parameters) + 6.0 * (self.trained or 0)
        return (weights + attention) * slot_tokens
