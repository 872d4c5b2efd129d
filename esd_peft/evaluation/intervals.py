"""95 % intervals: of a rate, and of a mean."""

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
DRAWS = 4000  # of a bootstrap


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson 1927): sound for few images, and for none or all of them."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = hits / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # rounding must not leave the rate itself outside
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The interval that holds `CONFIDENCE` of the bootstrap's draws `[DRAWS]`; NaN draws do not count."""
    low, high = np.nanpercentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def bootstrap_mean(values: list[float], seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, which are resampled `DRAWS` times (Efron 1979)."""
    weights = resample(len(values), np.random.default_rng(seed))
    return percentiles(weights @ np.asarray(values) / len(values))


def resample(count: int, random: np.random.Generator) -> np.ndarray:
    """Return the counts of `count` items in each bootstrap draw: `[DRAWS, count]`."""
    return random.multinomial(count, np.full(count, 1 / count), size=DRAWS)
