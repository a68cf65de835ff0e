"""The fitted law against laws that the data were made by."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.report.law import fit_law
from zoo.spec.base import ConfigError

E0, A, B, ALPHA, BETA = 1.7, 400.0, 2000.0, 0.34, 0.37


def made(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 2e10, 6)))
    loss = E0 + A / n**ALPHA + B / d**BETA
    return n, d, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))


def test_a_law_without_noise_is_found_exactly() -> None:
    law = fit_law(*made(0.0), resamples=5)
    for name, expected in zip("EABab", (E0, A, B, ALPHA, BETA), strict=True):
        assert law.named[name][0] == pytest.approx(expected, rel=0.01)
    assert law.r_squared == pytest.approx(1.0, abs=1e-6)
    assert float(law(7e10, 1.4e12)) == pytest.approx(E0 + A / 7e10**ALPHA + B / 1.4e12**BETA, rel=1e-3)
    assert law.params_exponent == pytest.approx(BETA / (ALPHA + BETA), rel=0.01)


def test_the_band_mostly_holds_the_truth_and_widens_beyond_the_data() -> None:
    inside = []
    for seed in range(4):
        law = fit_law(*made(0.01, seed), resamples=40)
        for n, d in ((3e7, 1e9), (1e11, 1e12)):
            low, high = law.band(n, d)
            inside.append(low < E0 + A / n**ALPHA + B / d**BETA < high)
        assert 0.97 < law.r_squared < 1
        near, far = (float(np.diff(law.band(n, d))[0]) for n, d in ((3e7, 1e9), (1e12, 1e14)))
        assert far > near
        value, least, most = law.named["E"]
        assert least <= value <= most
    assert sum(inside) >= 5


def test_one_run_that_is_far_off_pulls_little() -> None:
    n, d, loss = made(0.0)
    loss[7] *= 1.5
    assert fit_law(n, d, loss, resamples=1).irreducible == pytest.approx(E0, rel=0.02)


def test_too_little_is_refused_with_the_reason() -> None:
    n, d, loss = made(0.0)
    with pytest.raises(ConfigError, match="at least 6 finished runs; found 5"):
        fit_law(n[:5], d[:5], loss[:5])
    with pytest.raises(ConfigError, match="found 6 sizes and 1 numbers of tokens"):
        fit_law(n[:6], d[:6], loss[:6])
