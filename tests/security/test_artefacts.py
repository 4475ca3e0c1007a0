"""A training with hostile names and secrets around it: nothing outside its folders, no secret in anything it writes."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignlab.cli import main
from alignlab.configuration.checks import looks_secret, redact
from alignlab.configuration.compose import compose
from alignlab.configuration.plugins import copy, load, load_copies
from alignlab.errors import AlignlabError
from alignlab.runfolder import OURS

BODY = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5"
SECRETS = {
    "hugging face": "hf_" + BODY,
    "openai": "sk-proj-" + BODY,
    "anthropic": "sk-ant-api03-" + BODY,
    "github": "ghp_" + BODY,
    "github fine": "github_pat_" + BODY,
    "gitlab": "glpat-" + BODY[:20],
    "aws": "AKIA" + "Q3EGHJKLMNPRSTUV",
    "slack": "xoxb-123456789012-" + BODY,
    "google": "AIza" + BODY[:35],
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + BODY,
    "address": "https://someone:" + BODY + "@example.invalid/rows.jsonl",
    "signed address": "https://example.invalid/rows.jsonl?X-Amz-Signature=" + BODY,
    "bearer": "Authorization: Bearer " + BODY,
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n-----END RSA PRIVATE KEY-----",
    "no shape at all": "0123456789abcdef0123456789abcdef01234567",
}
SHAPED = [name for name in SECRETS if name != "no shape at all"]
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "SOME_SECRET", "API_KEY", "GITHUB_TOKEN")

NAMES = [
    "..", ".", "../x", "../../x", "/abs/x", "/etc/x", "a/b", "a/../../x", "./x", "x/", "x/..", "\\x", "..\\x", "C:\\x",
    "a\0b", "a\nb", "a\rb", "a\tb", "", " ", " x", "x ", "x.", ".x", "~", "~/x", "~root/x", "$HOME/x", "${oc.env:HOME}",
    "%2e%2e%2fx", "%00", "a" * 300, "．．／x", "‥/x", "x∕..∕y", "\u202ex", "-x", "--x", "*", "?x", "x:y", "x|y",
    "CON ", "x;touch y", "`touch y`", "$(touch y)", "é", "\ud800",
]  # fmt: skip


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to work in, two levels deep, so that what climbs out of it is seen."""
    folder = tmp_path / "above" / "home"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HOME", str(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------


def test_there_are_forty_names_and_twelve_secrets() -> None:
    assert len(set(NAMES)) >= 40
    assert len(SECRETS) >= 12


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_a_name_that_is_no_name_is_refused_as_a_runs(name: str, home: Path, tmp_path: Path) -> None:
    base = ["model=tiny", "data=sums", "objective=sft"]
    before = listing(tmp_path)
    with pytest.raises(AlignlabError) as error:
        compose([*base, f"run.name={name}"])
    assert error.value.exit_code == 2
    with pytest.raises(AlignlabError):
        compose(base, values={"run.name": name})
    (home / "theirs.yaml").write_text(f"run.name: {json.dumps(name)}\n")
    with pytest.raises(AlignlabError):
        compose(base, file=home / "theirs.yaml")
    for words in (
        ["cache", "rm", name],
        ["cache", "rm", "index", name],
        ["ls", name],
        ["train", "-m", f"run.name={name},b"],
    ):
        with contextlib.suppress(ValueError, UnicodeError):  # a NUL in a path
            assert main(words) != 0 or words[:1] in (["ls"], ["cache"])
    assert {path for path in listing(tmp_path) - before if "crashes" not in path} <= {
        "above/home/theirs.yaml", "above/home/cache"
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name and name not in ("", "\ud800")])
def test_a_plug_ins_copy_lands_in_the_run_folder(name: str, home: Path, tmp_path: Path) -> None:
    place = home / "run" / "plugins"
    place.parent.mkdir()
    (place).mkdir()
    source = home / "mine.py"
    source.write_text("X = 1\n")
    outside = home / "run" / "evil.py"
    outside.write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    copy(load([str(source)]), place)
    listed = json.loads((place / "plugins.json").read_text())
    assert list(listed) == ["mine.py"]
    import hashlib

    forged = {"../evil.py": hashlib.sha256(outside.read_bytes()).hexdigest(), name: "0" * 64}
    (place / "plugins.json").write_text(json.dumps(forged))
    with pytest.raises(AlignlabError):
        load_copies(place)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [*OURS, "logs/rank_1.log", "checkpoints/checkpoint-1", "exports/step-1"])
@pytest.mark.parametrize("verb", ["train", "evaluate", "export"])
def test_a_link_in_a_run_folder_is_refused(
    name: str, verb: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = home / "outside"
    outside.mkdir()
    run = home / "runs" / "x"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    if verb != "train" and name != "run.yaml":
        (run / "run.yaml").write_text("model: tiny\ndata: sums\nobjective: sft\n")
    target = outside / "file"
    if name == "run.yaml":
        target.write_text("model: tiny\ndata: sums\nobjective: sft\n")
    (run / name).symlink_to(target)
    before = listing(outside)
    words = ["train", "model=tiny", "data=sums", "objective=sft", "run.name=x"] if verb == "train" else [verb, "runs/x"]
    assert main(words) == 2
    assert "is a link" in capsys.readouterr().err
    assert listing(outside) == before


# ---------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPED)
def test_a_secret_is_refused_as_a_setting_and_never_shown(
    name: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = SECRETS[name]
    core = BODY if BODY in secret else secret
    assert looks_secret(secret)
    assert core not in redact(f"a {secret} b")
    (home / "theirs.yaml").write_text(f"logger: {{project: {json.dumps(secret)}}}\n")
    base = ["model=tiny", "data=sums", "objective=sft"]
    for words in (
        [*base, f"logger.project={secret}"], [*base, f"data.path={secret}"], [*base, f"data.options={{a: {secret!r}}}"],
        [*base, f"run.name={secret}"], [*base, f"nonsense.{secret}=1"], [*base, secret], ["theirs.yaml", *base],
        [*base, f"train.max_steps={secret}"], [*base, f"plugins=[{secret!r}]"], [*base, f"objective={secret}"],
    ):  # fmt: skip
        assert main(["train", *words]) == 2
    out, err = capfd.readouterr()
    assert core[:12] not in out + err
    assert not hits(home / "runs", secret)


def forms(secret: str) -> Iterator[bytes]:
    """The secret's own part, plain and as base64 at each of the three offsets."""
    core = BODY if BODY in secret else secret
    yield core.encode()
    for offset in range(3):
        text = base64.b64encode(b"x" * offset + core.encode())
        yield text[4 if offset else 0 : len(text) - 4]


def contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    for start in (place for place in range(len(data) - 2) if data[place : place + 3] == b"\x1f\x8b\x08"):
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj(31).decompress(data[start:])


def hits(root: Path, secret: str) -> list[str]:
    wanted = list(forms(secret))
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".safetensors")]
    return [str(path) for path in files for data in contents(path) for one in wanted if one in data]


def test_the_search_finds_what_it_should(tmp_path: Path) -> None:
    secret = SECRETS["hugging face"]
    for name, data in {
        "plain": secret.encode(), "base64": base64.b64encode(b"token: " + secret.encode()),
        "gzip": b"head" + gzip.compress(secret.encode()),
    }.items():  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_bytes(data)
        assert hits(folder, secret), name


PLUGIN = """
import logging, os, warnings
import torch
from dataclasses import dataclass
from alignlab.objectives.sft import SFT
from alignlab.registry import register_objective

@register_objective("leaky")
class Leaky(SFT):
    calls = 0

    def __call__(self, *args, **kwargs):
        Leaky.calls += torch.is_grad_enabled()
        told = open(os.environ["TOLD"]).read()
        logging.getLogger("library").warning("connecting with %s", told)
        warnings.warn("cannot reach " + told)
        if torch.is_grad_enabled() and Leaky.calls == int(os.environ["CRASH_AT"]):
            raise RuntimeError("401 for " + told)
        return super().__call__(*args, **kwargs)
"""


@pytest.fixture
def trained(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """A run that crashes at step 3, goes on, and is exported, with secrets in the environment and in every error."""
    for variable, secret in zip(VARIABLES, SECRETS.values(), strict=False):
        monkeypatch.setenv(variable, secret)
    monkeypatch.setenv("OTHER_API_KEY", SECRETS["no shape at all"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    (home / "told").write_text(" and ".join(SECRETS.values()))
    monkeypatch.setenv("TOLD", str(home / "told"))
    (home / "leaky.py").write_text(PLUGIN)
    rows = [
        {
            "id": name,
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
        for name in NAMES
        if name != "\ud800"
    ]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    words = [
        "train", "plugins=[./leaky.py]", "objective=leaky", "model=tiny", "data=rows.jsonl",
        "data.eval_path=rows.jsonl", "data.leaks=keep",
        "engine=local", "train.max_steps=4", "train.global_batch_size=2", "train.save_steps=1", "train.export_steps=2",
        "logger=[jsonl,tensorboard]", "run.name=x",
    ]  # fmt: skip

    def go() -> str:
        monkeypatch.setenv("CRASH_AT", "3")
        assert main(words) == 70
        monkeypatch.setenv("CRASH_AT", "-1")
        assert main(words) == 0
        assert main(["export", "runs/x"]) == 0
        assert main(["evaluate", "runs/x"]) == 0
        assert main(["show", "runs/x"]) == 0
        out, err = capfd.readouterr()
        return out + err

    return go


def test_a_run_leaves_no_secret_and_nothing_outside(trained: Callable[[], str], home: Path, tmp_path: Path) -> None:
    said = trained()
    log = (home / "runs" / "x" / "log.txt").read_text()
    assert "connecting with [redacted]" in log  # the library's own words
    assert "RuntimeError: 401 for [redacted]" in log + said  # the traceback; here pytest holds standard error
    for name, secret in SECRETS.items():
        assert not hits(home / "runs", secret), name
        assert not hits(home / "cache", secret), name
        assert (BODY if BODY in secret else secret) not in said, name
    assert {path.name for path in (tmp_path / "above").iterdir()} == {"home"}
    assert {path.name for path in tmp_path.iterdir()} == {"above"}
    made = {path.name for path in home.iterdir() if not path.name.startswith(".")}
    assert made <= {"runs", "cache", "told", "leaky.py", "__pycache__", "rows.jsonl"}  # Python's own, of the plug-in
    assert {path.name for path in (home / "runs" / "x").iterdir()} <= {*OURS, "owner.lock"}
