"""Krippendorff's alpha against published values and other formulas."""

import numpy as np
import pytest

from esd_peft.study.agreement import krippendorff_alpha

_ = np.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), the example with missing data: four observers, twelve
# units. He gives 0.815 (ordinal) and 0.849 (interval).
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


@pytest.mark.parametrize(("level", "alpha"), [("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_example(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


def test_interval_alpha_is_one_minus_the_ratio_of_mean_squares():
    """Without missing ratings: mean squared difference within images against that between any two ratings."""
    ratings = np.random.default_rng(0).integers(1, 6, (3, 20)).astype(float)
    within = np.mean([(a - b) ** 2 for unit in ratings.T for i, a in enumerate(unit) for b in unit[i + 1 :]])
    everything = ratings.ravel()
    between = np.mean([(a - b) ** 2 for i, a in enumerate(everything) for b in everything[i + 1 :]])
    assert krippendorff_alpha(ratings, "interval") == pytest.approx(1 - within / between)


def test_order_matters_and_distances_do_not_for_ordinal_ratings():
    stretched = np.where(PUBLISHED == 5, 500, PUBLISHED)
    assert krippendorff_alpha(stretched) == pytest.approx(krippendorff_alpha(PUBLISHED))
    assert krippendorff_alpha(stretched, "interval") != pytest.approx(krippendorff_alpha(PUBLISHED, "interval"))


def test_extremes():
    assert krippendorff_alpha(np.array([[1.0, 3, 5], [1, 3, 5]])) == 1
    assert abs(krippendorff_alpha(np.random.default_rng(1).integers(1, 6, (2, 4000)).astype(float))) < 0.05
    assert krippendorff_alpha(np.array([[1.0, 2, 3]])) is None  # nobody else rated
    assert krippendorff_alpha(np.array([[2.0, 2], [2, 2]])) is None
