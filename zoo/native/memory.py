"""Where weights lie in memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

_PAGE = 2**21
"""Bytes of a huge page."""
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1: move what lies in small pages to huge ones now."""


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Ask the system to hold large tensors of the processor in huge pages, where it knows how to; their numbers stay.

    Weights that are read once a token miss the translation cache at every small page: up to a third of the time.
    """
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        if tensor.device.type == "cpu" and end > start:
            advise(start, end - start, _COLLAPSE)  # advice: refusing it changes nothing
