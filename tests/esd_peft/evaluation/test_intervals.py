"""Intervals against published values and against what they promise."""

import numpy as np
import pytest

from esd_peft.evaluation.intervals import bootstrap_mean, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_holds_the_rate():
    for count in (1, 7, 500):
        for hits in (0, count // 2, count):
            low, high = wilson(hits, count)
            assert 0 <= low <= hits / count <= high <= 1


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = np.random.default_rng(0).normal(2, 1, 400)
    low, high = bootstrap_mean(list(values), seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_mean(list(values), seed=1) == (low, high)
