"""Shards: what is written is read again, and what has changed since is never read as if it had not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from zoo.data import shards
from zoo.data.documents import Position
from zoo.data.shards import SIDES, Extent, Facts, Shard, check_all, open_shard, write_shard
from zoo.data.stream import Piece
from zoo.spec.base import ConfigError

FACTS = Facts(
    key="k",
    start=Position(0, 3),
    next=Position(2, 1),
    last=False,
    cut=True,
    extents={"train": Extent(3, 40, 17), "heldout": Extent(1, 2, 3)},
    flaws=(("a.jsonl:3", "not JSON"),),
)


def shard(dtype: type = np.uint16, length: int = 5000, masked: bool = True) -> Shard:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 200, size=length).astype(dtype)
    learned = (random.random(length) < 0.5).astype(np.uint8) if masked else None
    return Shard(FACTS, {"train": Piece(tokens, learned), "heldout": Piece(tokens[:7])})


def contents(found: Shard) -> list[tuple[bytes, bytes]]:
    """Everything in a shard, read with its checks."""
    check_all(found)
    pieces = [found.pieces[side] for side in SIDES]
    return [(piece.tokens.tobytes(), b"" if piece.learned is None else piece.learned.tobytes()) for piece in pieces]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("length", [0, 1, 5000, 200_000])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_written_is_read(tmp_path: Path, dtype: type, length: int, masked: bool) -> None:
    written = shard(dtype, length, masked)
    write_shard(tmp_path / "a.safetensors", written)
    found = open_shard(tmp_path / "a.safetensors")
    assert found.facts == FACTS
    assert contents(found) == contents(written)
    assert found.pieces["train"].tokens.dtype == dtype
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_others_can_read_it(tmp_path: Path) -> None:
    written = shard()
    write_shard(tmp_path / "a.safetensors", written)
    arrays = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["train"], written.pieces["train"].tokens)
    np.testing.assert_array_equal(arrays["train.learned"], written.pieces["train"].learned)
    assert "heldout.learned" not in arrays


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    end=st.one_of(st.none(), st.floats(0, 1, exclude_max=True)),
    more=st.binary(max_size=3),
)
def test_damage_is_one_error_or_none(
    tmp_path: Path, places: list[tuple[float, int]], end: float | None, more: bytes
) -> None:
    path, written = tmp_path / "a.safetensors", shard(length=40_000)
    write_shard(path, written)
    content = bytearray(path.read_bytes())
    sound = bytes(content)
    for place, flip in places:
        content[int(place * len(content))] ^= flip
    path.write_bytes(content[: None if end is None else int(end * len(content))] + more)
    try:
        found = open_shard(path)
        assert contents(found) == contents(written)
        assert found.facts == FACTS
    except ConfigError as error:
        assert str(error).startswith(f"data: the tokens in {path} are damaged (")  # noqa: PT017
        assert path.read_bytes() != sound


@pytest.mark.parametrize("place", range(0, 1200, 7))
def test_every_part_of_a_header_counts(tmp_path: Path, place: int) -> None:
    path, written = tmp_path / "a.safetensors", shard(length=10)
    write_shard(path, written)
    content = bytearray(path.read_bytes())
    content[min(place, len(content) - 1)] ^= 1
    path.write_bytes(content)
    try:
        found = open_shard(path)
        assert (found.facts, contents(found)) == (FACTS, contents(written))  # a space in the header, say
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("claim", [8, 2**20, 2**40, 2**63])
def test_a_header_cannot_claim_memory(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(claim.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ConfigError, match="are damaged"):
        open_shard(path)
    entry = {"dtype": "U16", "shape": [claim], "data_offsets": [0, 2 * claim]}
    header = json.dumps({"train": entry, "__metadata__": {"facts": "00000000 "}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match=r"train is said to lie at 0 to \d+ of 0 bytes"):
        open_shard(path)


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, shard(length=400_000, masked=False))
    content = bytearray(path.read_bytes())
    start = content.index(shard(length=400_000).pieces["train"].tokens.tobytes()[:64])
    content[start + 700_000] ^= 1
    path.write_bytes(content)
    piece = open_shard(path).pieces["train"]
    piece.check(0, 300_000)
    piece.check(360_448, 400_000)
    block = f"train has changed between bytes {10 * 65536} and {11 * 65536}"
    for start, stop in ((0, 400_000), (350_000, 350_001), (327_680, 327_681)):
        with pytest.raises(ConfigError, match=block):
            piece.check(start, stop)
    piece.check(327_679, 327_680)


def test_other_safetensors_files_are_no_shards(tmp_path: Path) -> None:
    save_file({"train": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="are damaged"):
        open_shard(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"are damaged .*No such file"):
        open_shard(tmp_path / "b.safetensors")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, shard())
    before = path.read_bytes()

    def fail(number: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(shards.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_shard(path, shard(length=3))
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before
