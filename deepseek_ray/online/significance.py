"""Is a share larger than it may be? Evidence that stays valid however often, and whenever, one looks.

The Bayes factor of "some share above the null" against "the null" is, under the null or any smaller share, a
nonnegative supermartingale that begins at 1. By Ville's inequality it ever reaches 1 / alpha with probability at most
alpha (Robbins 1970; Howard et al. 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences"). So the
same number is a Bayesian answer and an always-valid test. Both sides are distributions of scipy.
"""

from __future__ import annotations

import math

from scipy import stats


def log_bayes_factor(hits: int, trials: int, null: float) -> float:
    """Natural logarithm of the evidence that the share of hits is above ``null``; before any, all shares are as likely.

    Args:
        hits: how many of the trials.
        trials: in all; each hits with the same probability, given those before.
        null: largest share that is tolerated, 0-1; at 0 and 1 there is nothing to test and the answer is 0.
    """
    if trials == 0 or not 0 < null < 1:
        return 0.0
    above = stats.beta.logsf(null, 1 + hits, 1 + trials - hits) - stats.beta.logsf(null, 1, 1)
    return float(stats.betabinom.logpmf(hits, trials, 1, 1) + above - stats.binom.logpmf(hits, trials, null))


def always_valid_p(log_factor: float) -> float:
    """p-value that holds at any stopping time: 1 / Bayes factor, at most 1."""
    return math.exp(-max(log_factor, 0.0))


def is_significant(log_factor: float, alpha: float) -> bool:
    """True when the evidence has reached 1 / alpha."""
    return log_factor >= -math.log(alpha)
