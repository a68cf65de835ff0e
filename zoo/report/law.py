"""The scaling law through runs: loss = E + A / N ** a + B / D ** b (arXiv:2203.15556)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.spec.base import ConfigError

Array = NDArray[np.float64]
LEAST_RUNS = 6
"""One more than the law has constants."""
HUBER = 1e-3
"""Where the loss on the logarithm's error turns from square to linear, as in the paper."""
STARTS = [(e, a, b) for e in (-1.0, 0.0, 0.5) for a in (0.2, 0.5) for b in (0.2, 0.5)]
BAND = (5.0, 95.0)
"""Percentiles of the refitted laws."""


@dataclass(frozen=True)
class Law:
    """A fitted law.

    `constants` and each row of `resampled` are log E, log A, log B, a, b.
    """

    constants: Array
    resampled: Array
    r_squared: float
    """Of the losses, not of their logarithms."""
    num_runs: int

    @property
    def irreducible(self) -> float:
        """E, nats a token."""
        return float(np.exp(self.constants[0]))

    @property
    def named(self) -> dict[str, tuple[float, float, float]]:
        """Each constant with the ends of its confidence band."""
        low, high = np.percentile(self.resampled, BAND, axis=0)
        natural = [np.concatenate([np.exp(row[:3]), row[3:]]) for row in (self.constants, low, high)]
        values = np.stack(natural, axis=1).tolist()
        return dict(zip(("E", "A", "B", "a", "b"), map(tuple, values), strict=True))

    def __call__(self, params: float | Array, tokens: float | Array) -> Array:
        """Expected loss, nats a token."""
        return np.exp(_log_loss(self.constants, np.log(params), np.log(tokens)))

    def band(self, params: float | Array, tokens: float | Array) -> Array:
        """Lower and upper end of the expected loss: [2, ...]."""
        curves = np.stack([np.exp(_log_loss(row, np.log(params), np.log(tokens))) for row in self.resampled])
        return np.percentile(curves, BAND, axis=0)

    @property
    def params_exponent(self) -> float:
        """The best number of parameters grows as this power of the FLOPs."""
        return float(self.constants[4] / (self.constants[3] + self.constants[4]))


def fit_law(
    params: Sequence[float], tokens: Sequence[float], losses: Sequence[float], resamples: int = 200, seed: int = 0
) -> Law:
    """Fit the law by least squares on the logarithms with Huber's loss; the band by fitting resampled runs anew.

    Args:
        params: N of each run.
        tokens: D of each run.
        losses: nats a token of each run.

    Raises:
        ConfigError: too few runs, or runs that do not tell N from D.
    """
    n, d, loss = (np.asarray(values, np.float64) for values in (params, tokens, losses))
    _check(n, d)
    data = np.log(n), np.log(d), np.log(loss)
    fits = [_fit(_start(data, *start), *data) for start in STARTS]
    _, best = min(fits, key=lambda found: found[0])
    rng = np.random.default_rng(seed)
    resampled: list[Array] = []
    while len(resampled) < resamples:
        chosen = rng.integers(len(n), size=len(n))
        if _tells(n[chosen], d[chosen]):
            resampled.append(_fit(best, *(values[chosen] for values in data))[1])
    predicted = np.exp(_log_loss(best, *data[:2]))
    rest, spread = ((predicted - loss) ** 2).sum(), ((loss - loss.mean()) ** 2).sum()
    return Law(best, np.stack(resampled), float(1 - rest / spread), len(n))


def _check(n: Array, d: Array) -> None:
    if len(n) < LEAST_RUNS:
        raise ConfigError(f"a law has 5 constants and takes at least {LEAST_RUNS} finished runs; found {len(n)}")
    if not _tells(n, d):
        sizes = f"{len(np.unique(n))} sizes and {len(np.unique(d))} numbers of tokens"
        raise ConfigError(f"a law takes at least 2 sizes and 2 numbers of tokens, each varied alone; found {sizes}")


def _tells(n: Array, d: Array) -> bool:
    """Whether both terms can be told apart: each of N and D varies where the other stays."""
    pairs = np.unique(np.stack([n, d]), axis=1)
    return len(pairs[0]) > len(np.unique(pairs[0])) and len(pairs[0]) > len(np.unique(pairs[1]))


def _log_loss(constants: Array, log_n: float | Array, log_d: float | Array) -> Array:
    log_e, log_a, log_b, a, b = constants
    found: Array = np.logaddexp(np.logaddexp(log_a - a * log_n, log_b - b * log_d), log_e)
    return found


def _start(data: tuple[Array, Array, Array], log_e: float, a: float, b: float) -> Array:
    """A guess whose three terms are of the size of the losses."""
    log_n, log_d, log_loss = (values.mean() for values in data)
    return np.array([log_loss - 0.7 + 0.3 * log_e, log_loss - 1.5 + a * log_n, log_loss - 1.5 + b * log_d, a, b])


def _fit(start: Array, log_n: Array, log_d: Array, log_loss: Array) -> tuple[float, Array]:
    from scipy.optimize import least_squares

    def errors(constants: Array) -> Array:
        return _log_loss(constants, log_n, log_d) - log_loss

    def slopes(constants: Array) -> Array:
        whole = _log_loss(constants, log_n, log_d)
        in_e = np.exp(constants[0] - whole)
        in_n = np.exp(constants[1] - constants[3] * log_n - whole)
        in_d = np.exp(constants[2] - constants[4] * log_d - whole)
        return np.stack([in_e, in_n, in_d, -log_n * in_n, -log_d * in_d], axis=1)

    bounds = [(-np.inf, -np.inf, -np.inf, 0.0, 0.0), (np.inf, np.inf, np.inf, 3.0, 3.0)]
    found = least_squares(errors, start, slopes, bounds, loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=400)
    return float(found.cost), np.asarray(found.x, np.float64)
