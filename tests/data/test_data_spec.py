"""Descriptions of data and tokenizers, and the YAML that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zoo.spec.base import ConfigError, Spec, choice_of, decode
from zoo.spec.data import BytesTokenizer, DataSpec, FilesData, FileTokenizer, StdlibData, TokenizerSpec

CONF = Path(__file__).parents[2] / "conf"


class Both(Spec):
    data: choice_of(DataSpec)
    tokenizer: choice_of(TokenizerSpec)


def load(group: str, name: str) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("data", "tokenizer", "expected"),
    [
        ("stdlib", "bytes", (StdlibData(), BytesTokenizer())),
        ("files", "file", (FilesData(paths=("a",)), FileTokenizer(path="t", separator="<|endoftext|>"))),
    ],
)
def test_shipped_yaml_gives_the_defaults(data: str, tokenizer: str, expected: tuple[Spec, Spec]) -> None:
    found = {"data": load("data", data), "tokenizer": load("tokenizer", tokenizer)}
    if data == "files":
        found["data"]["paths"], found["tokenizer"]["path"] = ["a"], "t"
    both = decode(Both, found)
    assert (both.data, both.tokenizer) == expected
    assert set(found["data"]) == set(type(both.data).model_fields)
    assert set(found["tokenizer"]) == set(type(both.tokenizer).model_fields)


def test_shipped_yaml_asks_for_what_only_the_user_knows() -> None:
    with pytest.raises(ConfigError) as error:
        decode(Both, {"data": load("data", "files"), "tokenizer": load("tokenizer", "file")})
    assert str(error.value).splitlines() == [
        "data.paths: found []; must name files, directories or patterns; for example data.paths=[texts/,more.jsonl]",
        "tokenizer.path: found ''; must name a tokenizer.json or its directory",
    ]


def test_one_path_needs_no_list() -> None:
    assert decode(FilesData, {"paths": "a.txt"}).paths == ("a.txt",)
    assert decode(FilesData, {"paths": ["a.txt", "b"]}).paths == ("a.txt", "b")


@pytest.mark.parametrize("fraction", [0, 0.0, 1, 1.5, -0.1, "5%"])
def test_held_out_fraction_is_a_part(fraction: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.heldout_fraction: found "):
        decode(StdlibData, {"heldout_fraction": fraction}, "data")


@pytest.mark.parametrize("spec", [FilesData(paths=("a", "b"), bad_lines="skip"), StdlibData(seed=3)])
def test_descriptions_survive_plain_data(spec: DataSpec) -> None:
    assert decode(type(spec), spec.to_dict()) == spec
