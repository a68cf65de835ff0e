"""Reports, pages and pictures: what they say is what the plan holds, and a page stands alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import zoo
from zoo.plan.budget import budget
from zoo.plan.inference import inference
from zoo.plan.page import page, write_page
from zoo.plan.pictures import comparison, pictures, write_pictures
from zoo.plan.plan import Plan
from zoo.plan.report import as_text, budget_report, inference_report, sensitivity_report
from zoo.plan.sensitivity import Sensitivity
from zoo.plan.wording import amount, count, seconds


@pytest.fixture(scope="module")
def made() -> Plan:
    return zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=16")


@pytest.fixture(scope="module")
def effects(made: Plan) -> Sensitivity:
    return made.sensitivity()


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Lines below a title by their first words."""
    block = text[text.index(title) :].split("\n\n")[0].splitlines()[1:]
    return {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in block}


def test_report_says_what_was_found(made: Plan) -> None:
    text = str(made)
    assert text == repr(made)
    memory = rows(text, "Memory of the fullest device")
    assert sum(float(cells[0]) for name, cells in memory.items() if name not in ("GiB",)) == pytest.approx(80, abs=0.1)
    for name, gib in made.memory_gib.items():
        if gib:
            assert float(memory[name][0]) == pytest.approx(gib, abs=0.006)
    assert rows(text, "Time of a step")["all"][0] == seconds(made.step_time_s)
    for part in (str(made.layout), f"MFU {made.mfu:.1%}", f"{made.tokens_per_s_per_device:,.0f} tokens/s a device"):
        assert part in text
    assert "What runs out first" in text
    assert max(map(len, text.splitlines())) <= 110


def test_announced_machines_are_marked() -> None:
    assert "(announced, not measured)" in str(zoo.plan("qwen3_8b", "vera_rubin_nvl72"))
    assert "announced" not in str(zoo.plan("qwen3_8b", "h100_8x"))


def test_tables_beside_it(made: Plan, effects: Sensitivity) -> None:
    run = budget(made, tokens=1e12, price_per_device_hour=2.0)
    text = " ".join(as_text([*sensitivity_report(effects), *budget_report(run)]).split())
    for effect in effects.effects:
        assert effect.resource in text
    assert f"{run.days:.3g} days" in text
    assert f"cost {run.cost:,.0f}" in text
    assert "arXiv:2404.10102" in text
    told = as_text(inference_report(inference("qwen3_8b", "rtx4090", context=32768, batch=8)))
    assert "does not fit" in told
    assert "cache: attention.keys" in told


class Reader(HTMLParser):
    """Collects what a page loads and the ids that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.loaded.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_page_stands_alone(made: Plan, effects: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "below" / "plan.html"
    write_page(path, page(made, pictures(made, effects), {"The run": budget_report(budget(made, days=3))}))
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.loaded == []
    assert reader.tags.count("svg") == 4
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "url(http" not in text
    assert "@import" not in text
    defined = set(reader.ids)
    assert len(defined) == len(reader.ids)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= defined
    for part in (str(made.layout), seconds(made.step_time_s), "What a better machine would bring", "days without"):
        assert part in text
    assert len(text) < 2_000_000


def test_pictures_are_files(made: Plan, effects: Sensitivity, tmp_path: Path) -> None:
    written = write_pictures(pictures(made, effects), tmp_path / "new")
    assert [path.name for path in written] == ["memory.png", "time.png", "landscape.png", "sensitivity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert set(pictures(made)) == {"memory", "time", "landscape"}


def test_bars_hold_the_numbers(made: Plan) -> None:
    figure = pictures(made)["memory"]
    (axes,) = figure.axes
    widths = [patch.get_width() for patch in axes.patches if patch.get_y() > 0.5]
    assert sum(widths) == pytest.approx(made.best.total_memory_gib, rel=0.01)


def test_comparison_names_what_has_no_plan() -> None:
    rows = [
        {"label": "a", "tokens_per_s_per_device": 10.0, "layout": "dp8"},
        {"label": "b", "tokens_per_s_per_device": None, "layout": None},
    ]
    (axes,) = comparison(rows).axes
    assert [text.get_text().split() for text in axes.texts] == [["10", "dp8"], ["no", "plan"]]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (count(999), "999"),
        (count(1.064e6), "1.06M"),
        (count(15e12), "15T"),
        (seconds(4.164), "4.16 s"),
        (seconds(0.0321), "32.1 ms"),
        (seconds(7.5e-6), "7.5 us"),
        (seconds(0), "0 s"),
        (seconds(12345.6), "12,346 s"),
        (amount(0.01234), "0.0123"),
        (amount(2116000.4), "2,116,000"),
    ],
)
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == expected
