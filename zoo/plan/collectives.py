"""Seconds of collectives on the links of a machine.

Devices are numbered so that the groups of tp, cp, ep and dp are as close together as that order allows; a group that
fits into a domain of fast links stays on them, another passes the network, on which each of its members in a domain
has an adapter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.plan.layout import Array


@dataclass(frozen=True)
class Links:
    """The links of a machine, as numbers or as arrays [n]."""

    domain: Array
    """Devices of a domain."""
    near_byte_s: Array
    """One way, per device, inside a domain."""
    far_byte_s: Array
    """One way, per device, between domains."""
    start_s: Array
    """Until the first byte arrives."""


def inside(group: Array, stride: Array, links: Links) -> Array:
    """Members of a group that share a domain; `stride` is the distance from one to the next."""
    return np.asarray(np.clip(np.floor(links.domain / stride), 1.0, group))


def ring_byte_s(group: Array, stride: Array, links: Links) -> Array:
    """Bytes per second of one device in a ring over a group."""
    members = inside(group, stride, links)
    far = np.minimum(links.near_byte_s, links.far_byte_s * members)
    return np.asarray(np.where(members >= group, links.near_byte_s, far))


def ring_seconds(num_bytes: Array, calls: Array, group: Array, stride: Array, links: Links) -> Array:
    """Seconds of all-gathers and reduce-scatters of `num_bytes` that each device sends in `calls` of them."""
    start = calls * links.start_s * (1.0 + np.log2(np.maximum(group, 1.0)))
    return np.asarray(np.where(group > 1, num_bytes / ring_byte_s(group, stride, links) + start, 0.0))


def distinct(choices: Array, targets: Array) -> Array:
    """How many of `targets` equal targets are hit by `choices` independent choices, on average."""
    return np.asarray(targets * (1.0 - (1.0 - 1.0 / targets) ** choices))


def exchange_seconds(
    num_bytes: Array, calls: Array, group: Array, stride: Array, choices: Array, links: Links
) -> Array:
    """Seconds of all-to-alls that bring tokens to experts and back.

    A token passes the network once for each domain that it is needed in and a fast link once for each device.

    Args:
        num_bytes: that each device would send were every choice sent by itself to another device.
        choices: experts of a token.
    """
    members = inside(group, stride, links)
    domains = np.maximum(group / members, 1.0)
    each = num_bytes / np.maximum(choices * (group - 1) / group, 1e-9)
    near = each * distinct(choices, group) * (members - 1) / group
    far = each * distinct(choices, domains) * (domains - 1) / domains
    start = calls * links.start_s * (1.0 + np.log2(np.maximum(group, 1.0)))
    seconds = near / links.near_byte_s + far / links.far_byte_s + start
    return np.asarray(np.where(group > 1, seconds, 0.0))
