"""Decoding on a processor: one token of each row at a time, as few calls of compiled kernels.

`compiled_step` turns a model and the states of its mixers into such a step. A block that the kernels do not know runs
as it is, between two runs of kernels; all else is done in fp32, whatever the weights are stored in.
"""

from __future__ import annotations

from zoo.decoding.step import CompiledStep as CompiledStep
from zoo.decoding.step import compiled_step as compiled_step
