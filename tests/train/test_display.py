"""The display: what it says, that it fits, and that no model output can disturb the terminal."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from zoo.train.display import LiveDisplay, PlainDisplay
from zoo.train.events import Evaluated
from zoo.train.panels import final, flow, header, load_bars, routing_table
from zoo.train.routing import layer_health
from zoo.train.wording import Rival, duration, judgement, printable, rivals, short_count, shown_path

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int = 100, height: int = 40, **options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, legacy_windows=False, **options)


def rendered(renderable, width: int = 100, height: int = 40) -> list[str]:
    console = terminal(width, height)
    console.print(renderable)
    return [line.rstrip() for line in ANSI.sub("", console.file.getvalue()).splitlines()]


def plain_lines(events, feed, log_every: int = 10) -> list[str]:
    stream = io.StringIO()
    display = PlainDisplay(log_every, stream)
    feed(display, events)
    display.close()
    return stream.getvalue().splitlines()


class TestPlain:
    def test_the_header_says_what_runs(self, made_up_run, feed) -> None:
        lines = plain_lines(made_up_run(), feed)
        assert lines[0] == "model     tiny_moe, 1.06M parameters, 412k active per token"
        assert lines[3] == "plan      60 steps of 4,096 tokens"
        assert lines[5].startswith("choices   precision fp32: this CPU")
        assert lines[6].startswith("          experts grouped: faster")
        assert lines[7] == "to beat   order-2 bytes, 2.655 held-out bits per byte"

    def test_one_aligned_line_for_the_first_step_and_every_tenth(self, made_up_run, feed) -> None:
        lines = [line for line in plain_lines(made_up_run(), feed) if line.startswith("step") and "loss" in line]
        assert [line[:10] for line in lines] == [f"step {step:>2}/60" for step in (1, 10, 20, 30, 40, 50, 60)]
        for label in ("loss", "bits/byte", "tokens/s", "MFU", "lr", "grad norm"):
            assert len({line.index(label) for line in lines}) == 1
        assert lines[1] == (
            "step 10/60  loss  3.1726  bits/byte  4.577  tokens/s  16,384  MFU 31.2%  lr 1.0e-03  grad norm  1.006  "
            "routing entropy 0.949  MaxVio  0.81 (layer 2)  dead 1"
        )

    def test_evaluations_are_held_against_the_baselines(self, made_up_run, feed) -> None:
        lines = [line for line in plain_lines(made_up_run(), feed) if line.startswith("step") and "held-out" in line]
        assert lines == [
            "step 20/60  held-out 3.052 bits/byte; order-2 bytes 2.655 ahead by 0.397",
            "step 40/60  held-out 2.118 bits/byte; order-2 bytes 2.655 beaten by 0.537",
            "step 60/60  held-out 1.941 bits/byte; order-2 bytes 2.655 beaten by 0.714",
        ]

    def test_the_end(self, made_up_run, feed, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        lines = plain_lines(made_up_run(), feed)
        end = lines[lines.index("done: 60 steps, 246k tokens in 15 s (16,384 tokens/s)") :]
        assert end[1:] == [
            "held-out  1.941 bits per byte, lower is better",
            "          2.655 order-2 bytes, beaten by 0.714",
            "          tiny_moe beats order-2 bytes by 0.714 bits per byte (26.9%)",
            "",
            "what it writes",
            "    def __init__(self, path):",
            "        return [bold]self.path\N{REPLACEMENT CHARACTER}[31m",
            "",
            "files",
            "    metrics.jsonl",
            "    loss_curve.png",
        ]

    def test_any_stream_can_hold_the_lines(self, made_up_run, feed) -> None:
        raw = io.BytesIO()
        display = PlainDisplay(10, io.TextIOWrapper(raw, encoding="ascii"))
        feed(display, made_up_run())
        text = raw.getvalue().decode("ascii")
        assert "self.path?[31m" in text
        assert printable(text) == text

    def test_a_dense_model_without_baselines_or_known_peak(self, made_up_run, feed) -> None:
        started, step, *_, finished = made_up_run(num_layers=0)
        started = dataclasses.replace(started, baselines={}, num_active_params=started.num_params, choices=())
        finished = dataclasses.replace(finished, baselines={}, last_eval=None, sample="", files=())
        lines = plain_lines(iter([started, dataclasses.replace(step, mfu=None), finished]), feed)
        assert lines[0] == "model     tiny_moe, 1.06M parameters"
        assert lines[6].endswith("tokens/s  16,384  lr 1.0e-03  grad norm  0.971")
        assert lines[-1] == "done: 60 steps, 246k tokens in 15 s (16,384 tokens/s)"

    def test_an_interrupted_and_resumed_run(self, made_up_run, feed) -> None:
        lines = plain_lines(made_up_run(first_step=20, last_step=45), feed)
        assert "plan      60 steps of 4,096 tokens, resumed after step 20" in lines
        assert "interrupted at step 45 of 60: 25 steps, 102k tokens in 6 s (16,384 tokens/s)" in lines


class TestLive:
    def test_the_whole_run_on_a_terminal(self, made_up_run, feed) -> None:
        console = terminal()
        display = LiveDisplay(console)
        feed(display, made_up_run())
        display.close()
        text = ANSI.sub("", console.file.getvalue())
        for part in (
            "tiny_moe, 1.06M parameters, 412k active per token",
            "60 / 60 steps",
            "load of each expert (half height: mean, x: none)",
            "held-out 1.941 bits/byte at step 60   order-2 bytes 2.655 beaten by 0.714",
            "done: 60 steps, 246k tokens in 15 s (16,384 tokens/s)",
            "tiny_moe beats order-2 bytes by 0.714 bits per byte (26.9%)",
            "return [bold]self.path\N{REPLACEMENT CHARACTER}[31m",
        ):
            assert part in text
        assert console.file.getvalue().count("\x1b[?25l") == console.file.getvalue().count("\x1b[?25h") == 1

    @pytest.mark.parametrize("width", [40, 60, 80, 100, 250])
    @pytest.mark.parametrize(("num_layers", "num_experts"), [(0, 8), (3, 8), (60, 8), (60, 384)])
    def test_it_fits(self, made_up_run, feed, width: int, num_layers: int, num_experts: int) -> None:
        height = 24
        display = LiveDisplay(terminal(width, height))
        events = list(made_up_run(num_steps=40, num_layers=num_layers, num_experts=num_experts))
        feed(display, iter(events[:-1]))
        lines = rendered(display.view(), width, height)
        display.close()
        assert max(map(len, lines)) <= min(width, 100)
        assert len(lines) < height
        for panel in (header(events[0], width), final(events[0], events[-1], width)):
            assert max(map(len, rendered(panel, width))) == width

    def test_time_left_counts_evaluations_but_not_the_slow_first_step(self, made_up_run, feed) -> None:
        display = LiveDisplay(terminal())
        started, first, second, *_ = made_up_run(num_steps=60)
        evaluated = Evaluated(step=2, loss=1.0, bits_per_byte=1.0, num_tokens=1, time_s=0.75)
        slow = dataclasses.replace(first, step_time_s=30.0)
        feed(display, iter([started, slow]))
        assert "1 / 60 steps  30 s" in rendered(display.view())[0]
        feed(display, iter([second, evaluated]))
        assert "2 / 60 steps  31 s, 58 s left" in rendered(display.view())[0]
        display.close()

    def test_the_routing_stays_until_the_next_report(self, made_up_run, feed) -> None:
        display = LiveDisplay(terminal())
        feed(display, iter(list(made_up_run())[:16]))
        display.close()
        text = "\n".join(rendered(display.view()))
        assert "15 / 60 steps" in text
        assert re.search(r"^ +2 +0\.887 +0\.81 +1 ", text, re.MULTILINE)

    def test_colours_are_optional(self, made_up_run, feed, monkeypatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        console = terminal()
        feed(LiveDisplay(console), made_up_run())
        codes = {
            int(code) for codes in re.findall(r"\x1b\[([0-9;]+)m", console.file.getvalue()) for code in codes.split(";")
        }
        assert codes <= {0, 1, 2}

    def test_close_restores_the_cursor_after_a_failure(self, made_up_run, feed) -> None:
        console = terminal()
        display = LiveDisplay(console)
        display.close()
        feed(display, iter(list(made_up_run())[:3]))
        display.close()
        display.close()
        assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


class TestRoutingTable:
    def test_many_layers_fold_worst_first(self) -> None:
        layers = [layer_health(layer, [100 + layer, 100, 100, 100]) for layer in range(20)]
        layers[7] = layer_health(7, [1, 1, 1, 0])
        lines = rendered(routing_table(layers, 80, max_rows=4))
        assert [line.split()[0] for line in lines[1:4]] == ["7", "19", "18"]
        assert lines[4] == "and 17 more: entropy >= 0.998, MaxVio <= 0.12, dead 0"

    def test_a_row_for_each_layer_in_order_when_they_fit(self) -> None:
        layers = [layer_health(layer, [100 + layer, 100]) for layer in range(4)]
        assert [line.split()[0] for line in rendered(routing_table(layers, 80, max_rows=4))] == ["layer", *"0123"]

    def test_bars(self) -> None:
        assert load_bars([4, 4, 4, 4], 10).plain == "▄▄▄▄"
        assert load_bars([0, 1, 15, 8, 8, 8, 8, 16], 10).plain == "x▁█▄▄▄▄█"
        assert load_bars([0] * 3, 10).plain == "xxx"

    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=80), st.integers(2, 40))
    def test_bars_keep_the_extremes(self, load: list[int], width: int) -> None:
        bars = load_bars(load, width).plain
        assert len(bars) == min(len(load), width)
        assert ("x" in bars) == (0 in load)
        if len(load) > width:
            assert list(bars.replace("x", "\0")) == sorted(bars.replace("x", "\0"), reverse=True)


class TestWording:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0"),
            (950, "950"),
            (1000, "1k"),
            (1_063_424, "1.06M"),
            (999_700, "1M"),
            (30.5e9, "30.5B"),
            (1.6e12, "1.6T"),
        ],
    )
    def test_short_count(self, count: float, text: str) -> None:
        assert short_count(count) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0 s"),
            (59.4, "59 s"),
            (59.6, "1 min 00 s"),
            (192, "3 min 12 s"),
            (3600, "1 h 00 min"),
            (90_061, "25 h 01 min"),
        ],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text

    @given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", errors="surrogateescape")))
    def test_printable_text_cannot_steer_a_terminal(self, text: str) -> None:
        assert all(char == "\n" or char.isprintable() for char in printable(text))
        printable(text).encode("utf-8")

    def test_printable_keeps_what_people_read(self) -> None:
        assert printable("na\u00efve\r\n\tif x:\n") == "na\u00efve\n    if x:\n"

    def test_paths_are_short_where_they_can_be(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert shown_path(tmp_path / "a" / "b.png") == "a/b.png"
        assert shown_path(Path("a/b.png")) == "a/b.png"
        assert shown_path(tmp_path.parent / "c") == str(tmp_path.parent / "c")

    def test_rivals_are_ranked(self) -> None:
        assert rivals(2.0, {"weak": 3.0, "strong": 1.5}) == [
            Rival("strong", 1.5, "ahead by 0.500"),
            Rival("weak", 3.0, "beaten by 1.000"),
        ]
        assert [rival.verdict for rival in rivals(None, {"weak": 3.0})] == ["to beat"]

    def test_the_judgement_names_the_best_rival(self, made_up_run) -> None:
        started, *_, finished = made_up_run()
        finished = dataclasses.replace(finished, baselines={"weak": 9.0, "strong": 1.5})
        assert judgement(started, finished) == "strong is still ahead of tiny_moe by 0.441 bits per byte"
        assert judgement(started, dataclasses.replace(finished, baselines={})) == ""

    def test_flow_breaks_between_pieces(self) -> None:
        assert flow([Text("a" * 5), Text("b" * 5), Text("c" * 5)], 13).plain == "aaaaa   bbbbb\nccccc"

    def test_a_loss_that_is_not_finite_is_shown_as_it_is(self, made_up_run, feed) -> None:
        started, step, *_ = made_up_run()
        broken = dataclasses.replace(step, loss=math.nan, bits_per_byte=math.nan)
        assert "loss     nan  bits/byte    nan" in plain_lines(iter([started, broken]), feed)[-1]
