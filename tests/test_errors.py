"""A mistake of the user ends in one clear message, exit status 2, at once, and never in a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.cli import VERBS

ROOT = Path(__file__).parents[1]

ON_THE_COMMAND_LINE = [
    ("zoo train optimizer.lrr=1e-3", "optimizer.lrr: unknown key; did you mean lr?"),
    (
        "python train.py model.attention.num_heads=7 model.attention.num_kv_heads=4",
        "model.attention.num_kv_heads: found 4; must divide num_heads (7)",
    ),
    ("python train.py model.moe.top_k=9", "model.moe.top_k: found 9; must be at most num_experts (8)"),
    ("zoo train model=tiny_mo", "model: found 'tiny_mo'; did you mean tiny_moe?; 'zoo list' shows all"),
    ("zoo show tiny_mo", "model: found 'tiny_mo'; did you mean tiny_moe?; 'zoo list' shows all"),
    ("zoo shov tiny_moe", f"zoo: found 'shov'; the verbs are {', '.join(VERBS)}; did you mean show?"),
    (
        "zoo train -m model=tiny_moe train.clip_norm=1,x",
        "in the job model=tiny_moe train.clip_norm=x:\ntrain.clip_norm: found",
    ),
]

WATCH = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from zoo.cli import main
if sys.argv[1] == "python":
    from zoo.train.run import main as train
    train(sys.argv[3:], program="python train.py")
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("command", "message"), ON_THE_COMMAND_LINE)
def test_mistake_on_the_command_line(command: str, message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *command.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    *lines, torch_imported = done.stderr.splitlines()
    assert "\n".join(lines).startswith(message)
    assert len(lines) == message.count("\n") + 1
    assert torch_imported == "False"
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []


IN_CODE = [
    (["zzz"], "model: found 'zzz'; there is no such model; 'zoo list' shows all"),
    (["tiny_moe", "model=tiny_dense"], "model=tiny_dense: the model is already named: tiny_moe; leave one of them out"),
    (["tiny_moe", "model/moe/router=sigmid"], "model/moe/router: found 'sigmid'; allowed: sigmoid, sigmoid_input,"),
    (
        ["tiny_moe", "model/mo/router=sigmoid"],
        "model/mo/router: found no such group in this configuration; did you mean",
    ),
    (["tiny_moe", "model/mlp=swiglu"], "model/mlp: found no such group .*'\\+model/mlp=swiglu' adds it$"),
    (["tiny_moe", "+model/mlp=swiglu"], "^model.mlp.d_ffn: missing; give it a value: model.mlp.d_ffn=...$"),
    (["tiny_moe", "model/moe=null"], "model/moe=null: a group takes the name of an option"),
    (["tiny_moe", "model.moe.num_expert=16"], "^model.moe.num_expert: unknown key; did you mean num_experts"),
    (["tiny_moe", "model.num_experts=16"], "^model.num_experts: unknown key; did you mean model.moe.num_experts\\?$"),
    (["tiny_moe", "model.moe.num_experts.x=1"], "model.moe.num_experts is a value and has no keys"),
    (["tiny_moe", "model.colour=3"], "^model.colour: unknown key; allowed: attention, card, d_model"),
    (["tiny_moe", "model.foo=3", "model.d_modl=3"], "^model.foo: .*\nmodel.d_modl: unknown key; did you mean d_model"),
    (["tiny_moe", "~model.norm.eps"], "stands at its default, .* there is nothing to remove$"),
    (["tiny_moe", "+model.norm.epsilon=1"], "^model.norm.epsilon: found 1; unknown key of NormSpec; did you mean eps"),
    (["tiny_moe", "mdel.d_model=1"], "^mdel: unknown key; did you mean model"),
    (["tiny_moe", "model.d_model"], "^model.d_model: has no value; write model.d_model=VALUE$"),
    (["tiny_moe", "model.moe.=16"], "^model.moe.=16: cannot be read at column 10; write KEY=VALUE"),
    (["tiny_moe", "model.layers=2*(sparse)"], "cannot be read .* in quotes: model.layers='2\\*\\(sparse\\)'$"),
    (["tiny_moe", "model.d_model=1,2"], "^model.d_model: found several values; a sweep needs -m; a list is"),
    (["tiny_moe", "model.d_model=range(1,3)"], "^model.d_model: found several values; a sweep needs -m$"),
    (["tiny_moe", "+model.d_model=3"], "^model.d_model: is set already; to change it, leave out the '\\+'$"),
    (["tiny_moe", "model.d_model=${no.such}"], "^model.d_model: Interpolation key 'no.such' not found$"),
    (["tiny_moe", "model.d_model='192'"], "^model.d_model: found '192'; input should be a valid integer$"),
    (["tiny_moe", "model.layers=3*dense"], "^model.layers: found 'dense'; allowed kinds: sparse$"),
    (
        ["tiny_moe", "model.layers='2*(sparse'"],
        "^model.layers: found '2\\*\\(sparse'; a '\\(' without its '\\)'.*column",
    ),
    (["tiny_moe", "model=null"], "already named"),
    (["tiny_moe", "data=books"], "^data: found 'books'; allowed: chat, files, hf, mixture, stdlib"),
    (["tiny_moe", "nogroup/x=1"], "^nogroup/x: found no such group in this configuration"),
]


@pytest.mark.parametrize(("asked", "message"), IN_CODE)
def test_mistake_in_code(asked: list[str], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message) as raised:
        zoo.load(*asked)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert "hydra" not in str(raised.value).lower()


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.registry._FOLDERS", {})
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/broken.yaml"
    path.write_text("d_model: [1\n")
    zoo.register(configs=tmp_path)
    with pytest.raises(zoo.ConfigError, match=r"broken\.yaml"):
        zoo.load("broken")
