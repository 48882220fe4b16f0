"""Quantiles of the largest of several t statistics that share one estimate of the variance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Matrix = NDArray[np.float64]

# scipy integrates by randomised quasi-Monte-Carlo: without a fixed generator two reports of one
# study would differ in the last digit. Over generators the quantile moves by about 0.002.
_GENERATOR = 1
_SOBOL_LOG2 = 17  # points of the sum where contrasts depend on each other; moves it by about 0.003
_SINGULAR = 1e-9  # smallest eigenvalue of a correlation matrix that scipy integrates well
_DIGITS = 9  # of a correlation as a key of the cache


def t_quantile(probability: float, df: float) -> float:
    """The t with P(T <= t) = `probability`."""
    return float(special.stdtrit(df, probability))


def max_t_quantile(covariance: Matrix, df: float, level: float) -> float:
    """The q with P(|T_i| <= q for every i) = `level`, T the multivariate t of the correlation.

    covariance: of the estimates, up to a factor. With one estimate it is Student's t, with many
    that share a control it is Dunnett's.
    """
    scale = np.sqrt(np.diag(covariance))
    correlation = _without_twins(covariance / np.outer(scale, scale))
    rows = tuple(tuple(round(float(r), _DIGITS) for r in row) for row in correlation)
    return _quantile(rows, float(df), level)


def _without_twins(correlation: Matrix) -> Matrix:
    """Leaves out a contrast that is another one, or its negative: |T| is the same."""
    kept: list[int] = []
    for i in range(len(correlation)):
        if all(abs(correlation[i, j]) < 1 - 1e-9 for j in kept):
            kept.append(i)
    return correlation[np.ix_(kept, kept)]


@lru_cache(maxsize=512)
def _quantile(rows: tuple[tuple[float, ...], ...], df: float, level: float) -> float:
    low = t_quantile((1 + level) / 2, df)
    if len(rows) == 1:
        return low
    correlation = np.array(rows)
    if np.linalg.eigvalsh(correlation)[0] < _SINGULAR:
        return _by_points(correlation, df, level)
    from scipy import optimize, stats  # takes seconds to load; the service does without it

    k = len(rows)

    def excess(q: float) -> float:
        # The same generator at every q: the probability is then a smooth function of it.
        inside = stats.multivariate_t.cdf(
            np.full(k, q),
            shape=correlation,
            df=df,
            lower_limit=np.full(k, -q),
            random_state=np.random.default_rng(_GENERATOR),
        )
        return float(inside) - level

    # One statistic alone and Bonferroni are bounds; a little room for the error of the sum.
    high = t_quantile(1 - (1 - level) / 2 / k, df)
    return float(optimize.brentq(excess, 0.98 * low, 1.02 * high, xtol=1e-5))


def _by_points(correlation: Matrix, df: float, level: float) -> float:
    """The quantile over Sobol points, for contrasts of which some follow from the others.

    scipy's integral wants a matrix of full rank: on Tukey's three pairs it is 0.03 too small.
    """
    from scipy.stats import qmc

    values, vectors = np.linalg.eigh(correlation)
    used = values > _SINGULAR
    root = vectors[:, used] * np.sqrt(values[used])
    points = qmc.Sobol(int(used.sum()) + 1, rng=np.random.default_rng(_GENERATOR)).random_base2(
        _SOBOL_LOG2
    )
    normal = special.ndtri(points[:, 1:])
    spread = np.sqrt(special.chdtri(df, points[:, 0]) / df)
    largest = np.abs(normal @ root.T).max(axis=1) / spread
    return float(np.quantile(largest, level))


def bonferroni_quantile(count: int, df: float, level: float) -> float:
    """For `count` statistics whose variances are their own, so that no joint t is known."""
    return t_quantile(1 - (1 - level) / 2 / count, df)


def correlated(rows: Sequence[Sequence[float]], per_arm: Sequence[float]) -> Matrix:
    """Covariance of contrasts (rows: weights by arm) of means with the variances `per_arm`."""
    weights = np.asarray(rows, dtype=np.float64)
    return np.asarray((weights * np.asarray(per_arm)) @ weights.T)
