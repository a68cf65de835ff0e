"""Descriptions of data and tokenizers, and the YAML that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zoo.config import compose
from zoo.spec.base import ConfigError, Spec, choice_of, decode
from zoo.spec.data import (
    BytesTokenizer,
    DataSpec,
    FilesData,
    FileTokenizer,
    HFData,
    MixtureData,
    StdlibData,
    TokenizerSpec,
)
from zoo.spec.run import decode_run

CONF = Path(__file__).parents[2] / "conf"
STDLIB = {"type": "stdlib"}
SPECS = [
    FilesData(paths=("a", "b"), on_bad="skip", heldout_paths=("c",)),
    StdlibData(seed=3),
    HFData(path="a", online=True, revision="main"),
    MixtureData(sources={"a": StdlibData(), "b": FilesData(paths=("c",))}, weights={"a": 1.5, "b": 2}),
]


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
        ("hf", "bytes", (HFData(path="a"), BytesTokenizer())),
        ("mixture", "bytes", (MixtureData(sources={"a": StdlibData()}), BytesTokenizer())),
    ],
)
def test_shipped_yaml_gives_the_defaults(data: str, tokenizer: str, expected: tuple[Spec, Spec]) -> None:
    found = {"data": load("data", data), "tokenizer": load("tokenizer", tokenizer)}
    needed = {"stdlib": {}, "files": {"paths": ["a"]}, "hf": {"path": "a"}, "mixture": {"sources": {"a": STDLIB}}}
    found["data"] |= needed[data]
    if tokenizer == "file":
        found["tokenizer"]["path"] = "t"
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


def test_a_held_out_text_of_its_own() -> None:
    assert decode(FilesData, {"paths": "a", "heldout_paths": "b"}).heldout_paths == ("b",)
    with pytest.raises(ConfigError, match=r"^data\.heldout_paths: found \[''\]; must name files"):
        decode(FilesData, {"paths": "a", "heldout_paths": ""}, "data")


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (HFData, {"path": ""}, r"^data\.path: found ''; must name a directory, or .* data\.online=true$"),
        (
            HFData,
            {"path": "a", "heldout_split": "train"},
            r"^data\.heldout_split: found 'train'; must differ",
        ),
        (HFData, {"path": "a", "revision": "main"}, r"^data\.revision: found 'main'; is for data sets of the Hub"),
        (
            FilesData,
            {"paths": "a", "prompt_key": "text"},
            r"^data\.prompt_key: found 'text'; must differ",
        ),
        (
            FilesData,
            {"paths": "a", "on_bad": "ignore"},
            r"^data\.on_bad: found 'ignore'; .*'stop' or 'skip'",
        ),
        (
            MixtureData,
            {"sources": {}},
            r"^data\.sources: found dict; must name at least one source; for",
        ),
        (
            MixtureData,
            {"sources": {"a": STDLIB, "b": STDLIB}, "weights": {"a": 1.0}},
            r"^data\.weights: found 'a'; must give a weight to each of the sources: a, b$",
        ),
        (
            MixtureData,
            {"sources": {"a": {"type": "mixture", "sources": {"b": STDLIB}}}},
            r"^data\.sources\.a\.type: found 'mixture'; allowed: chat, files, hf, stdlib",
        ),
        (
            MixtureData,
            {"sources": {"a": STDLIB}, "weights": {"a": 0}},
            r"^data\.weights\.a: found 0; .* greater",
        ),
        (
            FileTokenizer,
            {"path": "t", "separator": "x", "begin": "x"},
            r"^data\.begin: found 'x'; must differ from separator",
        ),
    ],
)
def test_what_does_not_fit_together(spec: type[Spec], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(spec, settings, "data")


def test_a_mixture_from_the_command_line() -> None:
    cfg = compose(
        [
            "data=mixture",
            "+data@data.sources.code=stdlib",
            "+data@data.sources.mine=files",
            "data.sources.mine.paths=[a.txt]",
            "+data.weights.code=3",
            "+data.weights.mine=1",
        ]
    )
    expected = MixtureData(
        sources={"code": StdlibData(), "mine": FilesData(paths=("a.txt",))}, weights={"code": 3, "mine": 1}
    )
    assert decode_run(cfg).data == expected


@pytest.mark.parametrize("spec", SPECS)
def test_descriptions_survive_plain_data(spec: DataSpec) -> None:
    assert decode(type(spec), spec.to_dict()) == spec
