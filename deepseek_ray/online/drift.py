"""Drift: has the input moved, have the scores moved?

Population stability index, Jensen-Shannon distance and Kolmogorov-Smirnov compare values with a reference. The index
has customary bounds and no upper end; the distance lies in [0, 1] and tells features apart that have all moved far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

from deepseek_ray.errors import DataError

Floats = npt.NDArray[np.float64]

PSI_WATCH = 0.1
PSI_ALARM = 0.25
"""Customary bounds in credit scoring (Siddiqi 2006): below 0.1 stable, above 0.25 moved."""

_FLOOR = 1e-4  # an empty bin would make the index infinite


@dataclass(frozen=True, eq=False)
class Reference:
    """Quantile bins of one feature or score, and the share of the reference in each.

    Args:
        name: feature, or "score".
        edges: inner edges, ascending and distinct, at most ``num_bins - 1``.
        shares: share of the reference rows a bin, ``len(edges) + 1`` of them; sums to 1.
        sample: sorted values kept for the Kolmogorov-Smirnov test.
    """

    name: str
    edges: Floats
    shares: Floats
    sample: Floats

    @classmethod
    def fit(cls, name: str, values: npt.ArrayLike, *, num_bins: int = 10, max_sample: int = 10_000) -> Reference:
        """Take the bins from reference values [n].

        Raises:
            DataError: there are no values, or one is NaN or infinite.
        """
        clean = _checked(name, values)
        edges = np.unique(np.quantile(clean, np.linspace(0, 1, num_bins + 1)[1:-1], method="inverted_cdf"))
        picks = np.linspace(0, clean.size - 1, min(clean.size, max_sample)).round().astype(np.int64)
        return cls(name, edges, _shares(clean, edges), np.sort(clean)[picks])


@dataclass(frozen=True)
class DriftResult:
    """Comparison of one feature with its reference.

    Args:
        name: feature, or "score".
        psi: population stability index, >= 0.
        js: Jensen-Shannon distance over the reference's bins, 0-1 (square root of the divergence in bits; Lin 1991,
            "Divergence measures based on the Shannon entropy").
        ks: largest distance between the distribution functions, 0-1.
        p_value: of the Kolmogorov-Smirnov test.
        num_rows: values compared.
    """

    name: str
    psi: float
    js: float
    ks: float
    p_value: float
    num_rows: int

    @property
    def level(self) -> str:
        """ "stable", "watch" or "alarm", by the index; with many rows the test calls everything different."""
        if self.psi >= PSI_ALARM:
            return "alarm"
        return "watch" if self.psi >= PSI_WATCH else "stable"


def psi(reference: Reference, values: npt.ArrayLike) -> float:
    """Population stability index, sum of (p - q) ln(p / q) over the reference's bins.

    Raises:
        DataError: there are no values, or one is NaN or infinite.
    """
    now = np.maximum(_shares(_checked(reference.name, values), reference.edges), _FLOOR)
    then = np.maximum(reference.shares, _FLOOR)
    return float(np.sum((now - then) * np.log(now / then)))


def js_distance(reference: Reference, values: npt.ArrayLike) -> float:
    """Jensen-Shannon distance to base 2 between the shares of the reference's bins, then and now.

    Raises:
        DataError: there are no values, or one is NaN or infinite.
    """
    return float(jensenshannon(_shares(_checked(reference.name, values), reference.edges), reference.shares, base=2))


def compare(reference: Reference, values: npt.ArrayLike) -> DriftResult:
    """Index, distance and test of live values [n] against the reference.

    Raises:
        DataError: there are no values, or one is NaN or infinite.
    """
    clean = _checked(reference.name, values)
    test = ks_2samp(reference.sample, clean, method="asymp")
    return DriftResult(
        name=reference.name,
        psi=psi(reference, clean),
        js=js_distance(reference, clean),
        ks=float(test.statistic),
        p_value=float(test.pvalue),
        num_rows=clean.size,
    )


def compare_all(references: Sequence[Reference], columns: Mapping[str, npt.ArrayLike]) -> list[DriftResult]:
    """Compare every referenced column, most moved first."""
    results = [compare(reference, columns[reference.name]) for reference in references]
    return sorted(results, key=lambda result: -result.psi)


def _shares(values: Floats, edges: Floats) -> Floats:
    # side="left": a value equal to an edge stays below it, so that mass on one value is one bin's
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1)
    return np.asarray(counts / values.size, dtype=np.float64)


def _checked(name: str, values: npt.ArrayLike) -> Floats:
    # as in training: served values are float64, and those that lie on the edge of a bin would fall on its other side
    clean = np.asarray(values, dtype=np.float32).astype(np.float64).ravel()
    if clean.size == 0:
        raise DataError(f"There are no values of {name!r} to compare.", fix="wait for more events")
    if not np.isfinite(clean).all():
        raise DataError(f"{name!r} holds NaN or infinity.", fix="drop those rows before comparing")
    return clean
