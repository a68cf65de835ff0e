"""Pictures are made from the metrics file alone, and show what is in it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from zoo.train.metrics_file import METRICS, MetricsFile, read_metrics
from zoo.train.plots import expert_load, loss_curve, smoothed, write_plots


@pytest.fixture
def recorded(tmp_path, made_up_run, feed):
    def record(**changes):
        writer = MetricsFile(tmp_path / METRICS)
        feed(writer, made_up_run(**changes))
        writer.close()
        return read_metrics(writer.path)

    return record


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_both_pictures_of_a_model_with_experts(tmp_path, recorded) -> None:
    recorded()
    written = write_plots(tmp_path)
    assert [path.name for path in written] == ["loss_curve.png", "expert_load.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_dense_model_has_no_load_map(tmp_path, recorded) -> None:
    recorded(num_layers=0)
    assert [path.name for path in write_plots(tmp_path)] == ["loss_curve.png"]


def test_nothing_to_draw_before_the_first_step(tmp_path, recorded) -> None:
    (tmp_path / METRICS).write_text(json.dumps(recorded()[0]) + "\n", encoding="utf-8")
    assert write_plots(tmp_path) == []


def test_the_loss_curve_shows_training_held_out_text_and_baselines(recorded) -> None:
    records = recorded()
    axes = loss_curve(records).axes[0]
    drawn = lines(axes)
    held_out = [(record["step"], record["bits_per_byte"]) for record in records if record["event"] == "evaluated"]
    np.testing.assert_allclose(drawn["held-out"], held_out)
    raw = next(iter(drawn.values()))
    np.testing.assert_allclose(raw[:, 1], [record["bits_per_byte"] for record in records if record["event"] == "step"])
    assert [2.655, 2.655] in [list(line[:, 1]) for line in drawn.values()]
    assert "order-2 bytes 2.655" in [text.get_text() for text in axes.texts]
    assert "tiny_moe" in axes.get_title(loc="left")


def test_steps_that_are_not_finite_leave_gaps(recorded) -> None:
    records = recorded()
    records[3]["bits_per_byte"] = None
    raw = next(iter(lines(loss_curve(records).axes[0]).values()))
    assert 3 not in raw[:, 0]
    assert len(raw) == 59


def test_the_load_map_shows_the_first_and_the_last_report(recorded) -> None:
    records = recorded(num_steps=30, num_layers=3, num_experts=8)
    figure = expert_load(records)
    first, last = (axes for axes in figure.axes if axes.get_images())
    for axes, step in ((first, 10), (last, 30)):
        report = next(record for record in records if record["event"] == "step" and record["step"] == step)
        loads = np.array([health["load"] for health in report["routing"]])
        np.testing.assert_allclose(axes.get_images()[0].get_array(), loads / loads.mean(axis=1, keepdims=True))
        assert axes.get_title() == f"load at step {step}, 1 dead (x)"
    violation = next(axes for axes in figure.axes if axes.get_ylabel().startswith("MaxVio"))
    assert [len(line.get_xydata()) for line in violation.get_lines()] == [3, 3, 3]


def test_one_report_makes_one_map(recorded) -> None:
    figure = expert_load(recorded(num_steps=10))
    assert len([axes for axes in figure.axes if axes.get_images()]) == 1


def test_layers_may_differ_in_their_number_of_experts(recorded) -> None:
    records = recorded(num_steps=20, num_layers=12)
    for record in records:
        for health in record.get("routing", ())[:1]:
            health["load"] = health["load"][:4]
    image = [axes for axes in expert_load(records).axes if axes.get_images()][-1].get_images()[0]
    assert np.isnan(np.ma.filled(image.get_array(), np.nan)[0, 4:]).all()


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_smoothing_keeps_straight_lines(count: int) -> None:
    x = np.arange(count) + 5.0
    places, values = smoothed(x, 3 - 0.1 * x)
    assert len(places) == min(count, 400)
    np.testing.assert_allclose(values, 3 - 0.1 * places, atol=1e-9)


def test_smoothing_removes_noise() -> None:
    noise = np.random.default_rng(0).normal(size=2000)
    _, values = smoothed(np.arange(2000.0), noise)
    assert np.abs(values[200:-50]).max() < 0.5


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, zoo.train.plots; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
