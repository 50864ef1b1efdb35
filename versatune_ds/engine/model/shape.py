"""The shape of a decoder: parameter counts and FLOPs, without building it.

With H hidden, M MLP width, d head size, n and k query and key-value heads, a layer holds attention
2 H n d + 2 H k d, MLP 3 H M, and vectors: its norms and biases (`families.py` says which).

FLOPs in two conventions, because numbers of other trainers are mostly in the second. The strict one counts
useful work only. A step of T real tokens, S of them supervised, in samples of lengths L_i costs

    6 N T                       linear layers, forward and backward (N: parameters outside embedding and head)
  + 6 H V S                     the head, on the positions that have a label
  + 6 n_layers A sum_i L_i^2    attention scores and values, the causal half (A: heads x head size)

Padding and recomputation are not counted; the embedding look-up is no matrix product. Per layer, scores
and values are two products of 2 A L^2 FLOPs forward, the causal half of that is 2 A L^2, and backward is
twice forward: 6 A L^2.

The common one (PaLM, arXiv 2204.02311, appendix B, and after it most papers and trainers) counts for every
slot token, padding and positions without a label included, in packs of P tokens

    6 N_all + 12 n_layers A P     N_all: all parameters, the embedding included (a tied matrix once)

as if each token attended to the whole pack, in both directions. It is the larger number of the two: packs
hold several samples, attention is causal, and the embedding multiplies nothing. Some (torchtitan) leave the
embedding out of N_all, so a number from elsewhere is compared with neither before its formula is known.
Worked: 8B (N_all 8.03e9, 32 layers, A 4096) in full samples of 4,096 tokens, 10,471 tokens/s on an H200, is
57.8 % in the common convention (54.6 GFLOPs a token) and 51.1 % in the strict one (48.2).

What is not covered: hardware FLOPs (with recomputation), sliding-window attention, mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    norms: int = 2
    """Norms of the hidden states in a layer."""
    fp32_norms: bool = False
    """They are scaled in fp32."""
    query_key_norms: bool = False
    """Norms of q and k."""
    counted: tuple[int, int] | None = None
    """Parameters of the built model: all, and all but embedding and head. None: by formula."""

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
        """Parameters of one layer, by formula."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.mlp + sum(self.vectors)

    @property
    def head_parameters(self) -> int:
        """Parameters of the head (and, as many, of an embedding of its own)."""
        return self.hidden * self.vocab

    @property
    def nonembedding_parameters(self) -> int:
        """N: all parameters but embedding and head, i.e. the layers and the last norm."""
        return self.counted[1] if self.counted else self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """N_all: all parameters, a tied matrix once."""
        if self.counted:
            return self.counted[0]
        return self.nonembedding_parameters + self.head_parameters * (1 if self.tied else 2)

    def step_flops(
        self, *, real_tokens: float, supervised_tokens: float, sum_squared_lengths: float
    ) -> float:
        """FLOPs of useful work of one optimizer step over all ranks; the first formula of the module's text.

        Args:
            real_tokens: tokens of samples, without padding.
            supervised_tokens: positions with a label.
            sum_squared_lengths: sum over samples of their length in tokens squared.
        """
        linear = 6.0 * self.nonembedding_parameters * real_tokens
        head = 6.0 * self.head_parameters * supervised_tokens
        attention = 6.0 * self.layers * self.query_width * sum_squared_lengths
        return linear + head + attention

    def step_flops_6n(self, *, slot_tokens: float, pack_len: int) -> float:
        """FLOPs of one optimizer step over all ranks as most papers count; the second formula.

        Args:
            slot_tokens: tokens of all packs, padding included.
            pack_len: tokens of one pack.
        """
        attention = 12.0 * self.layers * self.query_width * pack_len
        return (6.0 * self.parameters + attention) * slot_tokens
