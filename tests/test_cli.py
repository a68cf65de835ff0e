"""The command as a person meets it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path

import pytest

import zoo
from zoo.cli import VERBS, main
from zoo.cli.console import Parser
from zoo.cli.wording import claim_against, said

ROOT = Path(__file__).parents[1]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip()


def test_help_names_every_verb_and_each_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert text == printed(capsys, "--help") == printed(capsys, "help")
    for verb in VERBS:
        assert f"\n  {verb} " in text
        assert (ROOT / f"zoo/cli/{verb}.py").exists()
    for verb in set(VERBS) - {"train"}:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        assert f"usage: zoo {verb}" in capsys.readouterr().out
    assert printed(capsys, "--version") == f"zoo {zoo.__version__}\n"


def test_list_has_one_line_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = printed(capsys, "list").splitlines()
    assert head.split() == ["model", "family", "total", "active", "context", "layers"]
    assert [line.split()[0] for line in lines] == zoo.list_models()
    assert all(line == line.rstrip() for line in lines)


def test_list_reads_what_composition_says(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {fact["id"]: fact for fact in json.loads(printed(capsys, "list", "qwen3*", "--json"))}
    assert set(facts) == set(zoo.list_models("qwen3*"))
    for name in ("qwen3_30b_a3b", "qwen3_0_6b"):
        spec = zoo.load(name)
        assert spec.card is not None
        assert facts[name]["kinds"] == dict(Counter(spec.layer_kinds))
        for field in ("family", "context", "claimed_total", "claimed_active", "source"):
            assert facts[name][field] == getattr(spec.card, field)


def test_list_takes_patterns_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in printed(capsys, "list", "tiny_*").splitlines()[1:]]
    assert names == ["tiny_dense", "tiny_moe"]
    machines = printed(capsys, "list", "hardware").splitlines()[1:]
    assert [line.split()[0] for line in machines] == zoo.list_hardware()
    (fact,) = json.loads(printed(capsys, "list", "hardware", "h100_8x", "--json"))
    assert (fact["num_devices"], fact["memory_gib"], fact["chip"]) == (8, 80, "NVIDIA H100 SXM 80 GB")
    assert refused(capsys, "list", "qwn3_8b").startswith(
        "zoo list: found no models like 'qwn3_8b'; did you mean qwen3_8b"
    )
    assert "one pattern is enough" in refused(capsys, "list", "a", "b")
    assert "unrecognized arguments: --foo" in refused(capsys, "list", "--foo")


def test_show_counts_what_the_description_counts(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", "qwen3_30b_a3b")
    rows = {line.split()[0]: line.split()[1:] for line in text[text.index("\nCosts") :].splitlines() if line.strip()}
    assert rows["all"][:2] == ["30,532,122,624", "3,353,032,704"]
    parts = [row for name, row in rows.items() if len(row) >= 3 and row[0].replace(",", "").isdigit() and name != "all"]
    for column, total in enumerate(rows["all"][:2]):
        assert sum(int(row[column].replace(",", "")) for row in parts) == int(total.replace(",", ""))
    assert "48 x  sparse  attention + moe" in text
    assert "num_experts 128, top_k 8, d_expert 768" in text
    assert "30.53B parameters, counted 30.5B (+0.0%)" in text


def test_show_takes_overrides_and_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["model.moe.num_experts=16", "model/moe/router=sigmoid"]
    shown = json.loads(printed(capsys, "show", "tiny_moe", "--seq-len", "100", *changes, "--json"))
    spec = zoo.load("tiny_moe", *changes)
    assert shown["model"] == spec.to_dict()
    assert shown["params"]["total"] == spec.params().total
    assert shown["flops_per_token"]["total"] == spec.flops(100).total
    assert "router.score sigmoid" in printed(capsys, "show", "tiny_moe", *changes)
    assert refused(capsys, "show", "tiny_moe", "--seq-len", "0") == "--seq-len: found 0; must be at least 1"
    assert "the following arguments are required: MODEL" in refused(capsys, "show")


def test_diff_shows_what_differs_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "diff", "tiny_moe", "model.moe.top_k=4")
    settings, costs = text.split("\nCosts\n")
    assert [line.split() for line in settings.splitlines()[1:]] == [["moe.top_k", "2", "4"]]
    assert costs.splitlines()[1].split()[-1] == "1"
    two = printed(capsys, "diff", "tiny_moe", "tiny_moe", "model/moe/router=sigmoid")
    assert "moe.router.score" in two
    assert "attention" not in two
    assert "the settings are the same" in printed(capsys, "diff", "tiny_moe", "tiny_moe")
    assert "name two, or one with overrides" in refused(capsys, "diff", "tiny_moe")
    assert "name a model before its overrides" in refused(capsys, "diff", "model.d_model=3", "tiny_moe")


def test_models_of_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.registry._FOLDERS", {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("defaults: [qwen3_30b_a3b, _self_]\nlayers: 2*sparse\n")
    folder = ["--config-dir", str(tmp_path)]
    (fact,) = json.loads(printed(capsys, "list", "mine", "--json", *folder))
    assert (fact["family"], fact["kinds"]) == ("qwen3_moe", {"sparse": 2})
    assert printed(capsys, "show", "mine").startswith("mine (qwen3_moe): 2 layers")
    assert refused(capsys, "list", "--config-dir") == "--config-dir: missing; name a folder laid out like conf/"


def test_terminal_narrower_than_the_table_cuts_nothing() -> None:
    process, terminal = pty.fork()
    if process == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execve(sys.executable, [sys.executable, "-m", "zoo.cli", "show", "tiny_moe"], {**env, "TERM": "xterm"})
    written = b""
    while chunk := _read(terminal):
        written += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", written.decode()).splitlines()
    assert max(len(line.rstrip()) for line in lines if "num_experts" in line) <= 50
    count = zoo.load("tiny_moe").params()
    assert any(f"{count.total:,}" in line and f"{count.active:,}" in line for line in lines)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m zoo.cli list hardware | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


WATCH = """
import sys
from zoo.cli import main
main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["list", "show qwen3_30b_a3b", "diff qwen3_30b_a3b mixtral_8x7b"])
def test_reading_needs_no_torch(command: str) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("zoo ", set(VERBS)),
        ("zoo sh", {"show"}),
        ("zoo show tiny", {"tiny_dense", "tiny_moe"}),
        ("zoo train model=tiny", {"model=tiny_dense", "model=tiny_moe"}),
        ("python train.py optimizer=", {"optimizer=adamw", "optimizer=muon"}),
    ],
)
def test_completion_without_torch(line: str, expected: set[str]) -> None:
    program = ["train.py"] if line.startswith("python") else ["-m", "zoo.cli"]
    command = [sys.executable, "-X", "importtime", *program, "-sc", "query=bash"]
    env = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert set(done.stdout.split()) == expected
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_completion_installs_for_both_programs(capsys: pytest.CaptureFixture[str]) -> None:
    for program, name in ((["train.py"], "python"), (["-m", "zoo.cli"], "zoo")):
        script = subprocess.check_output([sys.executable, *program, "-sc", "install=bash"], cwd=ROOT, text=True)
        assert script.rstrip().endswith(f"-F hydra_bash_completion {name}")
    assert refused(capsys, "-sc") == "zoo -sc: has no value; write -sc install=bash"


def test_said_leaves_defaults_out() -> None:
    scaling = "model.attention.rope.scaling={type: yarn, factor: 4.0, original_context: 4096}"
    spec = zoo.load("tiny_moe", "model/moe/router=sigmoid", scaling)
    attention, moe = (said(spec.slots[slot]) for slot in ("attention", "moe"))
    assert attention["rope.scaling"] == "yarn"
    assert attention["rope.scaling.factor"] == 4.0
    assert "rope.theta" not in attention
    assert moe["router.score"] == "sigmoid"
    assert "router" not in moe


def test_claims_stand_beside_the_nearest_count() -> None:
    assert claim_against("active", "3.3B", [3_353_032_704, 3_041_867_776]) == "3.3B active, counted 3.35B (+1.6%)"
    assert claim_against("active", "a few", [1]) == "a few active"
    assert claim_against("active", None, [1]) == ""


def test_parser_reads_options_between_overrides() -> None:
    parser = Parser("show", "", "", "")
    parser.add_argument("asked", nargs="+")
    parser.add_argument("--seq-len", type=int)
    given = parser.read(["m", "a=1", "--seq-len", "5", "~b"])
    assert (given.asked, given.seq_len) == (["m", "a=1", "~b"], 5)
