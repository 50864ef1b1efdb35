"""A surface through noisy values at points of the simplex, with its uncertainty: a small Gaussian process.

With x = sqrt(w) of a mixture w (where little of a domain is there, a little more counts for much) values are
y_i = b + f(x_i) + noise, cov(f(x), f(x')) = s^2 k(x, x'), variance of the noise s^2 lambda, and

    k(x, x') = exp(-(x_j - x'_j)^2 / (2 l_own^2) - sum_{i != j} (x_i - x'_i)^2 / (2 l_other^2))

where j is the domain whose loss it is. With K = k + lambda I over the n points and 1 a vector of ones:

    b      1' K^-1 y / 1' K^-1 1
    s^2    (y - b)' K^-1 (y - b) / (n - 1)
    mean   b + k(x)' K^-1 (y - b)
    var    s^2 (1 - k(x)' K^-1 k(x) + (1 - 1' K^-1 k(x))^2 / 1' K^-1 1),  of a run there + s^2 lambda

(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.2 and 2.7.) l_own, l_other
and lambda are those of a grid with the highest restricted likelihood. What a surface is worth is seen by
leaving out each point: with P = K^-1 - K^-1 1 1' K^-1 / 1' K^-1 1 its error there is (P y)_i / P_ii, b found
anew without it.

Legend: n points, k domains, m points asked about.

What is not covered: which values (`run`), and what follows from them (`choice`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

OWN_LENGTHS = (0.15, 0.3, 0.6, 1.2, 2.4)
OTHER_LENGTHS = (0.3, 0.6, 1.2, 2.4, 4.8)
"""In units of sqrt(w); the simplex is sqrt(2) across."""
NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Surface:
    """A fitted surface.

    Attributes:
        points: float64[n, k], mixtures.
        values: float64[n].
        lengths: float64[k], length scale of each coordinate.
        noise: lambda.
        variance: s^2; None: from the values.
    """

    points: Array
    values: Array
    lengths: Array
    noise: float
    variance: float | None = None

    @classmethod
    def fit(cls, points: Array, values: Array, domain: int) -> Surface:
        """The likeliest surface of the grid; the first of equals.

        Args:
            points: float64[n, k], n >= 3.
            values: float64[n].
            domain: index of the domain whose loss the values are.
        """
        best: Surface | None = None
        for own, other, noise in itertools.product(OWN_LENGTHS, OTHER_LENGTHS, NOISES):
            lengths = np.full(points.shape[1], other)
            lengths[domain] = own
            found = cls(points, values, lengths, noise)
            if best is None or found.likelihood > best.likelihood:
                best = found
        assert best is not None
        return dataclasses.replace(best, variance=best.scale)

    def with_point(self, point: Array) -> Surface:
        """As if the mean had been found at `point` (float64[k]): there the surface is uncertain no more."""
        mean, _, _ = self.at(point[None])
        points, values = np.vstack([self.points, point]), np.append(self.values, mean)
        return dataclasses.replace(self, points=points, values=values)

    def at(self, points: Array) -> tuple[Array, Array, Array]:
        """Mean, its standard error, and that of a run's value, float64[m] each, at float64[m, k]."""
        inverse, ones, base = self._solved
        close = self._closeness(points)  # [m, n]
        mean = base + close @ (inverse @ (self.values - base))
        open_ = 1.0 - np.einsum("mi,ij,mj->m", close, inverse, close)
        open_ += (1.0 - close @ ones) ** 2 / ones.sum()
        open_ = np.maximum(open_, 0.0)
        return mean, np.sqrt(self.scale * open_), np.sqrt(self.scale * (open_ + self.noise))

    def left_out(self) -> Array:
        """float64[n]: value minus what the other points say of it, with these length scales and noise."""
        inverse, ones, _ = self._solved
        projected = inverse - np.outer(ones, ones) / ones.sum()
        return (projected @ self.values) / np.diag(projected)

    @property
    def scale(self) -> float:
        """s^2."""
        if self.variance is not None:
            return self.variance
        inverse, _, base = self._solved
        apart = self.values - base
        return max(float(apart @ inverse @ apart) / (len(apart) - 1), 1e-300)

    @functools.cached_property
    def likelihood(self) -> float:
        """Restricted log-likelihood, without its constant."""
        inverse, ones, _ = self._solved
        log_determinant = -np.linalg.slogdet(inverse)[1]
        return -0.5 * float((len(ones) - 1) * np.log(self.scale) + log_determinant + np.log(ones.sum()))

    @functools.cached_property
    def _solved(self) -> tuple[Array, Array, float]:
        """K^-1 (float64[n, n]), K^-1 1 (float64[n]), and b."""
        n = len(self.points)
        noisy = self._closeness(self.points) + self.noise * np.eye(n)
        inverse = np.asarray(np.linalg.inv(noisy), dtype=np.float64)
        ones: Array = inverse.sum(axis=1)
        return inverse, ones, float(ones @ self.values / ones.sum())

    def _closeness(self, points: Array) -> Array:
        """k between `points` (float64[m, k]) and ours: float64[m, n]."""
        here, there = (np.sqrt(each) / self.lengths for each in (points, self.points))
        return np.exp(-0.5 * ((here[:, None] - there[None]) ** 2).sum(axis=2))
