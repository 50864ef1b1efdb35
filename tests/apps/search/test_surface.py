"""The surface, against numbers made by hand."""

import math

import numpy as np
import pytest

from versatune_ds.apps.search.surface import NOISES, Surface

POINTS = np.array([[1.0, 0.0], [0.0, 1.0]])
VALUES = np.array([0.3, 0.1])
NOISE = 0.01
# x is (1, 0) and (0, 1): k = exp(-1 / (2 0.5^2) - 1 / (2 1^2)) = exp(-2.5)
CLOSE = math.exp(-2.5)


def two(**more: float) -> Surface:
    return Surface(POINTS, VALUES, np.array([0.5, 1.0]), NOISE, **more)


def test_two_points_by_hand():
    # b = (0.3 + 0.1) / 2; (y - b) = (0.1, -0.1) is an eigenvector of K with the eigenvalue 1 + noise - k
    surface, eigenvalue = two(), 1 + NOISE - CLOSE
    assert surface.scale == pytest.approx(2 * 0.1**2 / eigenvalue, rel=1e-12)
    mean, error, run_error = surface.at(POINTS)
    assert mean[0] == pytest.approx(0.2 + 0.1 * (1 - CLOSE) / eigenvalue, rel=1e-12)
    # K^-1 = [[1 + noise, -k], [-k, 1 + noise]] / det; 1' K^-1 = (1, 1) / (1 + noise + k)
    determinant = (1 + NOISE) ** 2 - CLOSE**2
    explained = ((1 + NOISE) * (1 + CLOSE**2) - 2 * CLOSE**2) / determinant
    lever = (1 - (1 + CLOSE) / (1 + NOISE + CLOSE)) ** 2 * (1 + NOISE + CLOSE) / 2
    variance = surface.scale * (1 - explained + lever)
    assert error[0] ** 2 == pytest.approx(variance, rel=1e-9)
    assert run_error[0] ** 2 == pytest.approx(variance + surface.scale * NOISE, rel=1e-9)


def test_likelihood_by_hand():
    # (n - 1) log s^2 + log |K| + log 1' K^-1 1, |K| = (1 + noise)^2 - k^2, 1' K^-1 1 = 2 / (1 + noise + k)
    scale = 2 * 0.1**2 / (1 + NOISE - CLOSE)
    determinant = (1 + NOISE) ** 2 - CLOSE**2
    expected = -0.5 * (math.log(scale) + math.log(determinant) + math.log(2 / (1 + NOISE + CLOSE)))
    assert two().likelihood == pytest.approx(expected, rel=1e-12)


def test_half_way_between_the_two_the_mean_is_theirs():
    even = Surface(POINTS, VALUES, np.ones(2), NOISE)
    mean, error, _ = even.at(np.array([[0.5, 0.5]]))
    assert mean[0] == pytest.approx(0.2, rel=1e-12)
    assert error[0] > even.at(POINTS)[1][0]


def test_left_out_is_what_a_surface_without_the_point_says():
    # of two points, what one says of the other is its own value
    np.testing.assert_allclose(two().left_out(), [0.2, -0.2], rtol=1e-12)
    generator = np.random.default_rng(1)
    points, values = generator.dirichlet(np.ones(3), 6), generator.normal(size=6)
    lengths = np.array([0.3, 1.2, 1.2])
    errors = Surface(points, values, lengths, 0.1).left_out()
    for i in range(6):
        without = Surface(np.delete(points, i, 0), np.delete(values, i), lengths, 0.1)
        assert errors[i] == pytest.approx(values[i] - without.at(points[i : i + 1])[0][0], rel=1e-8)


def test_a_point_that_is_taken_as_found_changes_no_mean_and_lowers_the_error_near_it():
    surface = two(variance=0.04)
    place = np.array([[0.7, 0.3]])
    mean, error, _ = surface.at(place)
    more = surface.with_point(place[0])
    again, smaller, _ = more.at(place)
    assert again[0] == pytest.approx(mean[0], rel=1e-9)
    assert smaller[0] < 0.5 * error[0]
    assert more.scale == surface.scale


def test_fit_finds_a_law_and_what_is_noise():
    generator = np.random.default_rng(0)
    points = generator.dirichlet(np.ones(3), 24)
    law = -0.1 * np.sqrt(points[:, 0])  # a loss that depends on the own share only
    clean = Surface.fit(points, law, 0)
    assert clean.noise == NOISES[0]
    assert clean.lengths[0] < clean.lengths[1]
    assert clean.left_out().std() < 0.05 * law.std()
    noise = Surface.fit(points, generator.normal(size=24), 0)
    assert noise.noise == NOISES[-1]
