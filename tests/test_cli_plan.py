"""`zoo plan` as a person meets it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.cli import main
from zoo.cli.settings import jobs, read_settings

ROOT = Path(__file__).parents[1]
ASKED = ("plan", "qwen3_30b_a3b", "h100_8x", "hardware.num_devices=16")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.strip()


def test_report_and_json_agree_with_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    made = zoo.plan(*ASKED[1:], seq_len=8192)
    text = printed(capsys, *ASKED, "seq_len=8192")
    said = json.loads(printed(capsys, *ASKED, "seq_len=8192", "--json"))
    assert str(made.layout) in text
    assert said["layout"]["ep"] == made.layout.ep
    assert said["step_time_s"] == made.step_time_s
    assert said["memory_gib"] == made.memory_gib


def test_both_ways_to_name_things(capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(capsys, "plan", "qwen3_8b", "h100_8x", "tp=2")
    assert first == printed(capsys, "plan", "hardware=h100_8x", "parallel.tp=2", "model=qwen3_8b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny_moe h100_8x hardware.num_devices=7 tp=4", "tp: found 4; must divide the 7 devices"),
        ("tiny_moe h100_8x hardware/chip=h1000", "hardware/chip: found 'h1000'"),
        ("tiny_moe hh100_8x", "hardware: found 'hh100_8x'; did you mean h100_8x"),
        ("llama3_1_405b rtx4090", "llama3_1_405b fits in no layout of rtx4090"),
        ("tiny_moe h100_8x hardware.chip.memory=3", "hardware.chip.memory: unknown key; did you mean memory_gib"),
        ("tiny_moe h100_8x seqlen=3", "seqlen: found 3; unknown key of ZooPlan; did you mean seq_len?"),
        ("tiny_moe h100_8x tp=x", "tp: found 'x'"),
        ("tiny_moe h100_8x tp=2 tp=4", "tp: is given twice"),
        ("tiny_moe h100_8x tp=1,2", "tp: found several values"),
        ("tiny_moe h100_8x model=tiny_dense", "model=tiny_dense: the model is already named: tiny_moe"),
        ("tiny_moe h100_8x again", "again: the model is tiny_moe and the machine h100_8x"),
        ("hardware=h100_8x", "zoo plan: found no model"),
        ("tiny_moe h100_8x context=5", "context: found 5; it goes with inference=true"),
        ("tiny_moe h100_8x inference=true tp=2", "tp: found 2; it is a setting of training"),
        ("tiny_moe h100_8x report=a.txt", "report: found 'a.txt'"),
        ("tiny_moe h100_8x cost=1e6", "price_per_device_hour: a budget of money needs it"),
        ("-m tiny_moe h100_8x report=a.html", "report: found 'a.html'; it goes with a single plan"),
        ("tiny_moe h100_8x out=x", "out: found 'x'; it goes with -m"),
    ],
)
def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    error = refused(capsys, "plan", *words.split())
    assert error.startswith(message) or message in error
    assert len(error.splitlines()) == 1


def test_further_ways_to_see_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, folder = tmp_path / "a" / "plan.html", tmp_path / "pictures"
    text = printed(
        capsys,
        *ASKED,
        f"report={page}",
        f"png={folder}",
        "sensitivity=true",
        "tokens=1e12",
        "days=3",
        "checkpoint_every=50",
    )
    assert "What a better machine would bring" in text
    assert "GiB every 50 steps" in " ".join(text.split())
    assert "3 days without interruption" in text or "days without interruption" in text
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == [
        "landscape.png", "memory.png", "sensitivity.png", "time.png",
    ]  # fmt: skip
    assert f"written: {page}" in text


def test_inference(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "qwen3_8b", "rtx4090", "inference=true", "context=32768", "batch=1")
    assert "fits: " in printed(capsys, *words)
    said = json.loads(printed(capsys, *words, "--json"))
    assert said["fits"]
    assert said["cache_gib"]["attention.keys"] == pytest.approx(2.25)


def test_sweep_makes_one_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("-m", "model=qwen3_8b,llama3_1_405b", "hardware=h100_8x", "seq_len=2048,4096")
    text = printed(capsys, "plan", *words, f"out={tmp_path}")
    with (tmp_path / "plans.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert [row["seq_len"] for row in rows if row["model"] == "qwen3_8b"] == ["2048", "4096"]
    for row in rows:
        if row["model"] == "llama3_1_405b":
            assert "fits in no layout" in row["problem"]
            continue
        made = zoo.plan(row["model"], row["hardware"], seq_len=int(row["seq_len"]))
        assert float(row["step_time_s"]) == made.step_time_s
        assert row["layout"] == str(made.layout)
    assert (tmp_path / "plans.png").stat().st_size > 1000
    assert len([line for line in text.splitlines() if "qwen3_8b" in line or "405b" in line]) == 4


def test_lists_are_split_outside_of_brackets_alone() -> None:
    assert jobs(["a=1,2", "b", "c=[1,2],3"]) == [
        ["a=1", "b", "c=[1,2]"], ["a=1", "b", "c=3"], ["a=2", "b", "c=[1,2]"], ["a=2", "b", "c=3"],
    ]  # fmt: skip
    assert jobs(["recompute=selective:act,mlp"]) == [["recompute=selective:act,mlp"]]


def test_settings() -> None:
    found = read_settings(["m", "h", "model.moe.top_k=2", "model_scale=tiny", "precision=[bf16,fp8]", "tokens=15e12"])
    assert (found.model, found.hardware) == ("m", "h")
    assert found.overrides == ("model.moe.top_k=2", "model_scale=tiny")
    assert found.keys.precision == ("bf16", "fp8")
    assert found.keys.tokens == 15e12
    assert read_settings(["m"]).hardware == "auto"


WATCH = """
import sys
from zoo.cli import main
main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
"""


def test_planning_needs_no_torch() -> None:
    devices = 4096
    model = next(name for name in ("nemotron_3_ultra_550b_a55b", "qwen3_coder_480b_a35b") if name in zoo.list_models())
    words = ("plan", model, "gb300_nvl72", f"hardware.num_devices={devices}")
    done = subprocess.run([sys.executable, "-c", WATCH, *words], cwd=ROOT, capture_output=True, text=True)
    assert f"on {devices:,} x NVIDIA GB300" in done.stdout
    assert done.stderr.strip() == "False"
