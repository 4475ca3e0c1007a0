"""The command itself: verbs, help, JSON, errors, what is imported when."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import alignlab
from alignlab import cli
from alignlab.cli import main
from alignlab.errors import ConfigError
from alignlab.request import Request, make_request
from alignlab.verb_table import VERBS

BASE = ["objective=dpo", "model=tiny", "data=sums"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("option", ["--help", "--help-all", "--version"])
def test_help_imports_nothing_heavy(option: str) -> None:
    script = (
        f"import sys\nfrom alignlab.cli import main\ncode = main([{option!r}])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'trl', 'hydra', 'omegaconf', 'numpy', 'yaml', 'peft'}\n"
        "sys.exit(code or sorted(heavy & set(sys.modules)) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_help_shows_six_verbs_and_help_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    short = capsys.readouterr().out
    assert [name for name in VERBS if f"\n  {name} " in short] == [n for n, verb in VERBS.items() if verb.beginner]
    assert sum(verb.beginner for verb in VERBS.values()) == 6
    main(["--help-all"])
    everything = capsys.readouterr().out
    assert all(f"\n  {name} " in everything for name in VERBS)
    assert main(["train", "--help"]) == 0
    assert main([]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_exists_only_when_its_file_does(verb: str) -> None:
    assert find_spec(VERBS[verb].path.partition(":")[0]) is not None
    assert callable(cli.load(verb))


def test_python_m_is_the_same() -> None:
    answer = subprocess.run([sys.executable, "-m", "alignlab", "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout == f"alignlab {alignlab.__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "did you mean train?"),
        (["objective=dpo"], "a verb comes first"),
        (["train", "missing.yaml"], "no such file"),
        (["train", "a.yaml", "b.yaml"], "one file or folder"),
        (["train", *BASE, "--beta", "0.1"], "objective.beta=..."),
        (["train", *BASE, "--learning_rate=1"], "optim.learning_rate=..."),
        (["train", "."], "no run.yaml"),
        (["show", "optm"], "optim"),
        (["cache", "rn"], "cache ls"),
        (["cache", "rm", "nothing"], "no entries of kind"),
        (["ls", "nowhere"], "no such folder"),
        (["evaluate", "./nowhere"], "no such run or model"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.yaml", "b.yaml", "0.1"):
        Path(name).write_text("")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert hint in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *BASE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["objective.beta"] == 0.1
    assert found["provenance"]["optim.learning_rate"] == "conf/objective/dpo.yaml"
    assert main(["show", *BASE, "--json", "out/x.json"]) == 0
    assert json.loads(Path("out/x.json").read_text())["name"] == found["name"]
    assert "objective:" in capsys.readouterr().out
    assert main(["train", "--json", "seed=x"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 2
    assert captured.err.startswith("alignlab: ")
    for words in (["env"], ["cache", "ls"], ["show"], ["show", "objective"]):
        assert main([*words, "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_show_lists_every_group_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("objective", "cpo", "zero3", "rmsprop", "run.name", "sums"))
    main(["show", "objective"])
    text = capsys.readouterr().out
    assert "objective.propagation_norm" in text
    assert "objective.loss_type" in text
    main(["show", *BASE, "optim.learning_rate=1e-4"])
    text = capsys.readouterr().out
    assert "learning_rate: 0.0001" in text
    assert "# command line" in text
    main(["show", "objective=dpo"])
    assert "# model is missing" in capsys.readouterr().out


def test_our_bugs_leave_a_traceback_in_a_file_and_a_line_on_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("no hf_abcdefghijklmnopqrstuvwxyz here")

    monkeypatch.setattr(cli, "load", lambda verb: broken)
    assert main(["env"]) == 70
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    (file,) = (tmp_path / "cache" / "crashes").iterdir()
    assert str(file) in line
    assert "Traceback" in file.read_text()
    assert "hf_abc" not in line + file.read_text()


def test_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []

    def record(request: Request) -> int:
        seen.append(request)
        return 0

    monkeypatch.setattr(cli, "load", lambda verb: record)
    Path("mine.yaml").write_text("objective: dpo\nmodel: tiny\ndata: sums\nseed: 3\n")
    assert alignlab.run("train", "mine.yaml", optim={"learning_rate": 1e-5}, **{"objective.beta": 0.3}) == 0
    config = seen[0].config
    assert (config.optim.learning_rate, config.objective.beta, config.seed) == (1e-5, 0.3, 3)
    assert alignlab.run("train", objective="sft", model="a=b", data="sums", seed=4) == 0
    assert seen[1].config.model.name_or_path == "a=b"
    with pytest.raises(ConfigError, match="did you mean"):
        alignlab.run("train", "mine.yaml", sed=1)


def test_targets(tmp_path: Path) -> None:
    Path("a=b").mkdir()
    Path("a=b/f.yaml").write_text("objective: dpo\nmodel: tiny\ndata: sums\n")
    assert make_request("train", ["a=b/f.yaml"]).config.objective.name == "dpo"
    Path("a=b/run.yaml").write_text("objective: sft\nmodel: tiny\ndata: sums\n")
    Path("a=b/model").mkdir()
    for target in ("a=b", "a=b/model"):
        request = make_request("evaluate", [target])
        assert request.config.objective.name == "sft"
    plain = make_request("evaluate", ["Qwen/Qwen3-0.6B", "data=sums"])
    assert plain.config.model.name_or_path == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("word", ["~nobody-here", "~nobody-here/runs"])
def test_a_tilde_of_nobody_is_a_name_like_any_other(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", word]) in (0, 2)
    assert cli.main(["train", word]) == 2
    assert f"no such file: {word}" in capsys.readouterr().err
