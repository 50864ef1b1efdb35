"""Loss statistics per domain: the layout of the reduced buffer and what can be computed from it.

A training step adds six numbers per domain to a fixed `[m, k]` float64 buffer, m = `NUM_ROWS` rows and k
domains. The buffer holds sums only, so buffers of micro-steps, steps and ranks simply add up, and every mean
is one division at the very end: never a mean of means.

    row           unit      sum over the samples i of a domain
    LOSS_SUM      nats      S_i     S_i: sum of the token losses of sample i
    TOKENS        tokens    n_i     n_i: supervised tokens of sample i, counted on shifted labels
    SAMPLES       samples   1       samples with n_i > 0
    LOSS_SQ       nats^2    S_i^2
    LOSS_TOKENS   nats      S_i n_i
    TOKENS_SQ     tokens^2  n_i^2

The last three give the standard error of the mean loss: the tokens of one sample are not independent, so the
sample is the unit of noise.

What is not covered: accumulating and reducing the buffer on a device (`versatune_ds.engine`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.foundations.errors import StateError
from versatune_ds.strategies.simplex import Vector


class SumRow(enum.IntEnum):
    """Rows of the buffer of sums; see the module docstring for units."""

    LOSS_SUM = 0
    TOKENS = 1
    SAMPLES = 2
    LOSS_SQ = 3
    LOSS_TOKENS = 4
    TOKENS_SQ = 5


NUM_ROWS = len(SumRow)


def sample_terms(loss: Any, tokens: Any) -> list[Any]:
    """What n samples add to the rows, in their order: float64[n] each, as arrays or as tensors."""
    return [loss, tokens, tokens.clip(0, 1), loss * loss, loss * tokens, tokens * tokens]


@dataclass(frozen=True, eq=False)
class DomainSums:
    """Sums per domain, already reduced over ranks.

    Args:
        values: float64[NUM_ROWS, k], rows as in `SumRow`; finite. A private read-only copy is kept.

    Raises:
        ValueError: wrong shape, a value that is not finite, or a negative count.
    """

    values: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] != NUM_ROWS:
            raise ValueError(f"sums have shape {values.shape}; expected ({NUM_ROWS}, k)")
        if not np.isfinite(values).all():
            row, domain = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"{SumRow(row).name} of domain id {domain} is {values[row, domain]}: "
                "a step with non-finite losses must be skipped, not observed"
            )
        if (values[[SumRow.TOKENS, SumRow.SAMPLES]] < 0).any():
            raise ValueError("a token or sample count is negative")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @classmethod
    def zeros(cls, num_domains: int) -> DomainSums:
        return cls(np.zeros((NUM_ROWS, num_domains)))

    @classmethod
    def from_samples(
        cls,
        domain_ids: npt.ArrayLike,
        sample_loss: npt.ArrayLike,
        sample_tokens: npt.ArrayLike,
        num_domains: int,
    ) -> DomainSums:
        """Sums of n samples.

        Args:
            domain_ids: int[n], 0 .. num_domains - 1.
            sample_loss: float[n], sum of token losses of each sample in nats.
            sample_tokens: int[n], supervised tokens of each sample; samples with none do not count.
        """
        ids = np.asarray(domain_ids, dtype=np.int64)
        loss = np.asarray(sample_loss, dtype=np.float64)
        tokens = np.asarray(sample_tokens, dtype=np.float64)
        if not ids.shape == loss.shape == tokens.shape or ids.ndim != 1:
            raise ValueError(f"shapes differ: {ids.shape}, {loss.shape}, {tokens.shape}; expected (n,)")
        if ids.size and not 0 <= ids.min() <= ids.max() < num_domains:
            raise ValueError(f"domain ids must lie in 0 .. {num_domains - 1}")
        supervised = tokens > 0
        ids, loss, tokens = ids[supervised], loss[supervised], tokens[supervised]
        terms = sample_terms(loss, tokens)
        return cls(np.stack([np.bincount(ids, weights=term, minlength=num_domains) for term in terms]))

    @property
    def num_domains(self) -> int:
        return int(self.values.shape[1])

    @property
    def tokens(self) -> Vector:
        """float64[k]: supervised tokens."""
        return self.values[SumRow.TOKENS]

    @property
    def samples(self) -> Vector:
        """float64[k]: samples with at least one supervised token."""
        return self.values[SumRow.SAMPLES]

    def __add__(self, other: DomainSums) -> DomainSums:
        return DomainSums(self.values + other.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DomainSums) and np.array_equal(self.values, other.values)

    def mean_loss(self) -> Vector:
        """float64[k]: nats per supervised token, l = sum S_i / sum n_i; NaN for a domain without tokens."""
        return _divide(self.values[SumRow.LOSS_SUM], self.tokens, where=self.tokens > 0)

    def stderr(self) -> Vector:
        """float64[k]: standard error of `mean_loss`; NaN for a domain with fewer than two samples.

        Ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 2.11):
        var(l) = n / (n - 1) * sum (S_i - l n_i)^2 / (sum n_i)^2 over the n samples.
        """
        loss = np.nan_to_num(self.mean_loss())
        residual = (
            self.values[SumRow.LOSS_SQ]
            - 2.0 * loss * self.values[SumRow.LOSS_TOKENS]
            + loss * loss * self.values[SumRow.TOKENS_SQ]
        )
        enough = self.samples >= 2
        # equal samples leave a residual of about -1e-16 relative: rounding, not a variance
        variance = self.samples * np.maximum(residual, 0.0)
        variance = _divide(variance, (self.samples - 1.0) * self.tokens**2, where=enough)
        return np.sqrt(variance)

    def total_loss(self) -> float | None:
        """Nats per supervised token over all domains together; None without any token."""
        tokens = math.fsum(self.tokens)
        return math.fsum(self.values[SumRow.LOSS_SUM]) / tokens if tokens > 0 else None

    def to_json(self) -> dict[str, list[float]]:
        """The sums by row name; exact, since Python writes floats so that they read back bit for bit."""
        return {row.name.lower(): [float(v) for v in self.values[row]] for row in SumRow}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> DomainSums:
        """Inverse of `to_json`; StateError: a row is missing, unknown, or not numbers of one length."""
        names = [row.name.lower() for row in SumRow]
        if sorted(state) != sorted(names):
            raise StateError(f"sums hold the rows {sorted(state)}; expected {sorted(names)}")
        try:
            return cls(np.array([state[name] for name in names], dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise StateError(f"sums cannot be read: {error}") from None


def _divide(numerator: Vector, denominator: Vector, where: npt.NDArray[np.bool_]) -> Vector:
    """Quotient where it is defined, else NaN."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=where)
