"""Krippendorff's alpha: how far raters agree beyond chance. 1 is perfect, 0 is chance."""

from typing import Literal

import numpy as np


def krippendorff_alpha(ratings: np.ndarray, level: Literal["ordinal", "interval"] = "ordinal") -> float | None:
    """α = 1 − D_o / D_e (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).

    With o_ck the coincidences of the values c and k within an image, n_c their sums and n the sum of these:

        D_o = Σ_ck o_ck δ²_ck / n,   D_e = Σ_ck n_c n_k δ²_ck / (n (n − 1))
        δ²_ck = (c − k)²  (interval)   or   (Σ_{g=c..k} n_g − (n_c + n_k) / 2)²  (ordinal)

    Args:
        ratings: `[raters, images]` float, NaN where a rater did not rate. Images with one rating do not count.

    Returns:
        α, or none where it is not defined: no image was rated twice, or all ratings are the same.
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[None] == values[:, None, None]).sum(1).astype(float)  # [values, images]
    raters = counts.sum(0)
    counts, raters = counts[:, raters > 1], raters[raters > 1]
    coincidences = (counts / (raters - 1)) @ counts.T - np.diag((counts / (raters - 1)).sum(1))
    totals = coincidences.sum(0)
    if level == "interval":
        distance = (values[:, None] - values[None]) ** 2
    else:
        below = np.cumsum(totals) - totals / 2  # so that a difference leaves out half of both ends
        distance = (below[:, None] - below[None]) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / max(totals.sum() - 1, 1)
    return None if expected == 0 else float(1 - (coincidences * distance).sum() / expected)
