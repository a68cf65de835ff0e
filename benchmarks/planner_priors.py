"""What is known of the planner's constants before they are fitted: how far each may be from its first guess."""

from __future__ import annotations

SPREAD = 0.35
"""Of shared constants around their first guess, in logarithms."""
SPREADS = {
    "dense": 0.15,
    "dense_fp8": 0.1,
    "dense_fp4": 0.2,
    "grouped": 0.2,
    "grouped_narrow": 0.15,
    "recurrence": 0.7,
    "touches": 0.25,
    "touches_routed": 0.25,
    "casts": 0.25,
    "casts_routed": 0.25,
    "launch_s": 0.5,
    "wake_s": 0.7,
    "pace_full": 0.1,
    "near": 0.1,
    "near_exchange": 0.05,
    "far": 0.15,
    "ep_full": 0.25,
    "bubble": 0.05,
    "accumulate": 0.5,
    "micro_s": 1.0,
    "step_s": 1.0,
    "jitter": 0.7,
}
"""Of those that are known better or worse than that; kernels and links were measured alone."""
OWN = (
    "dense",
    "dense_fp8",
    "attention",
    "grouped",
    "touches",
    "launch_s",
    "tp_exposed",
    "ep_exposed",
    "dp_window",
    "far",
)
OWN_SPREAD = 0.15
PACE_SPREAD = {
    "pace": 0.08,
    "pace_moe": 0.15,
    "accumulate": 0.3,
    "dp_window": 0.35,
    "tp_exposed": 0.5,
    "micro_s": 1.5,
}
CHIP_SPREAD = 0.05
ORDER_WEIGHT = 2.0
"""Of differences within a series over the errors themselves."""
NOISE = 0.06
"""Of a published number: what two runs of one recipe differ by."""
TAILS = (50.0, 12.0, 6.0)
"""Degrees of freedom of Student's distribution around a prediction: a row that is far off pulls little. From nearly
Gaussian to robust, step by step: the objective of the first has one valley, and the last starts in it."""
AT_MOST_ONE = ("tp_exposed", "ep_exposed", "cp_exposed", "pp_exposed", "near", "near_exchange", "far", "dp_window")
AT_MOST_ONE += ("dense", "attention")
