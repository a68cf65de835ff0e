"""Numbers as one says them."""

from __future__ import annotations


def count(number: float) -> str:
    """In three digits: 950, 1.06M, 30.5B, 15T."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def seconds(time: float) -> str:
    """In the unit that leaves one to three digits before the point: 4.16 s, 32.1 ms, 7.5 us."""
    if time >= 1 or time == 0:
        return f"{time:.3g} s" if time < 1000 else f"{time:,.0f} s"
    if time >= 1e-3:
        return f"{time * 1e3:.3g} ms"
    return f"{time * 1e6:.3g} us"


def amount(number: float) -> str:
    """In three digits with thousands set apart: 0.0123, 86.1, 2,116,000."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
