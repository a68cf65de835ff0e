"""The layer-pattern language."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.spec.pattern import MAX_LAYERS, PatternError, compress, expand

KINDS = st.sampled_from(["dense", "sparse", "a", "b_2"])


@given(st.lists(KINDS, min_size=1, max_size=60))
def test_compress_is_undone_by_expand(layers: list[str]) -> None:
    assert expand(compress(tuple(layers))) == tuple(layers)


@st.composite
def patterns(draw: st.DrawFn, depth: int = 3) -> tuple[str, tuple[str, ...]]:
    """A pattern and, by plain arithmetic on lists, what it means."""
    text, layers = [], ()
    for _ in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            inner, item = draw(patterns(depth - 1))
            written = f"({inner})"
        else:
            written = draw(KINDS)
            item = (written,)
        count = draw(st.integers(1, 3))
        space = draw(st.sampled_from(["", " "]))
        text.append(f"{count}{space}*{space}{written}" if count > 1 or draw(st.booleans()) else written)
        layers += item * count
    return "  ".join(text), layers


@given(patterns())
def test_expand_means_what_the_grammar_says(pattern: tuple[str, tuple[str, ...]]) -> None:
    text, layers = pattern
    assert expand(text) == expand(f"  {text} ") == layers


@given(patterns())
def test_compress_is_no_longer_than_the_layers_spelt_out(pattern: tuple[str, tuple[str, ...]]) -> None:
    _, layers = pattern
    assert len(compress(layers)) <= len(" ".join(layers)) + 2  # "a a" is shown as "2*a"


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        (("dense",) * 3 + ("sparse",) * 58, "3*dense 58*sparse"),
        ((*("local",) * 5, "global") * 8, "8*(5*local global)"),
        ((*("local",) * 5, "global") * 4 + ("local",) * 2, "4*(5*local global) 2*local"),
        (("mamba", "moe") * 3 + ("attention",), "3*(mamba moe) attention"),
        (("only",), "only"),
    ],
)
def test_compress_finds_the_pattern_that_a_person_writes(layers: tuple[str, ...], pattern: str) -> None:
    assert compress(layers) == pattern


@pytest.mark.parametrize(
    ("pattern", "column", "reason"),
    [
        ("", 1, "expected at least one layer"),
        ("   ", 4, "expected at least one layer"),
        ("3*dense 2x", 9, "expected a kind's name"),
        ("dense, sparse", 6, "expected a kind's name"),
        ("3* ", 4, "expected a kind's name or '('"),
        ("3*4*dense", 3, "expected a kind's name or '('"),
        ("2*(dense", 9, "a '(' without its ')'"),
        ("dense )", 7, "a ')' without its '('"),
        ("2*()", 4, "empty brackets"),
        ("0*dense", 1, "a repeat must give 1 to"),
        ("dense 100000*dense", 7, "a repeat must give 1 to"),
        ("9999*(9999*(9999*dense))", 7, "a repeat must give 1 to"),
        ("(" * 30 + "a" + ")" * 30, 21, "expected a kind's name or '('"),
    ],
)
def test_mistakes_are_placed(pattern: str, column: int, reason: str) -> None:
    with pytest.raises(PatternError, match=re.escape(reason)) as error:
        expand(pattern)
    assert f"at column {column}:" in str(error.value)


@given(st.text(alphabet="ab_1290*() ,-", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        layers = expand(text)
    except PatternError:
        return
    assert 0 < len(layers) <= MAX_LAYERS
    assert expand(compress(layers)) == layers if len(layers) < 200 else True
