"""Configurations and rows from anybody: no import path is ever followed, no bomb is ever unpacked."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from alignlab.cli import main
from alignlab.configuration import checks, yamlio
from alignlab.configuration.compose import compose
from alignlab.data.formats import to_sample
from alignlab.data.rows import Row
from alignlab.errors import AlignlabError, ConfigError, DataError

CALLS = [
    "os.system",
    "posix.system",
    "subprocess.call",
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.getoutput",
    "os.popen",
    "os.execvp",
    "os.spawnlp",
    "pty.spawn",
    "distutils.spawn.spawn",
    "logging.os.system",
    "shutil.os.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "runpy.run_path",
    "runpy.run_module",
    "code.interact",
    "codeop.compile_command",
    "timeit.timeit",
    "cProfile.run",
    "profile.run",
    "trace.Trace",
    "pdb.run",
    "doctest.run_docstring_examples",
    "pickle.loads",
    "pickle.load",
    "marshal.loads",
    "shelve.open",
    "dill.loads",
    "cloudpickle.loads",
    "joblib.load",
    "numpy.load",
    "numpy.loadtxt",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.ops.load_library",
    "torch.utils.collect_env.run",
    "torch.utils.cpp_extension.load_inline",
    "transformers.AutoModel.from_pretrained",
    "transformers.pipeline",
    "transformers.dynamic_module_utils.get_class_from_dynamic_module",
    "datasets.load_dataset",
    "datasets.load_from_disk",
    "huggingface_hub.snapshot_download",
    "pathlib.Path.write_text",
    "pathlib.Path.touch",
    "builtins.open",
    "io.open",
    "os.mkdir",
    "shutil.copy",
    "shutil.rmtree",
    "urllib.request.urlopen",
    "urllib.request.urlretrieve",
    "socket.create_connection",
    "http.server.test",
    "webbrowser.open",
    "ctypes.CDLL",
    "importlib.import_module",
    "importlib.reload",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "omegaconf.OmegaConf.register_new_resolver",
    "pydoc.locate",
    "concurrent.futures.ThreadPoolExecutor",
    "multiprocessing.Process",
    "asyncio.run",
]
BASE = ["model=tiny", "data=sums", "objective=dpo"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose appearance would say that something ran."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def gadget(call: str, canary: Path) -> dict[str, Any]:
    return {"_target_": call, "_args_": [f"touch {canary}"], "_partial_": False}


def refused(action: Any, *words: str) -> str:
    with pytest.raises(AlignlabError) as error:
        action()
    assert error.value.exit_code == 2
    assert all(word in str(error.value) for word in words), str(error.value)
    return str(error.value)


def test_there_are_sixty_gadgets() -> None:
    assert len(set(CALLS)) >= 60


@pytest.mark.parametrize("call", CALLS)
def test_an_import_path_is_refused_wherever_it_stands(call: str, canary: Path) -> None:
    made = gadget(call, canary)
    text = json.dumps(made)
    file = canary.parent / "run.yaml"

    def from_file(content: str) -> None:
        file.write_text(content)
        compose(BASE, file=file)

    refused(lambda: compose([*BASE, f"optim._target_={call}"]), "_target_")
    refused(lambda: compose([*BASE, f"+optim._target_={call}"]))
    refused(lambda: compose([*BASE, f"data.options={text}"]), "_target_")
    refused(lambda: compose([*BASE, f"data.sources=[{text}]"]), "_target_")
    refused(lambda: compose([*BASE, f"optim.name=${{{call}:touch {canary}}}"]))
    refused(lambda: compose(BASE, values={"data.options": {"a": {"b": [made]}}}), "_target_")
    refused(lambda: from_file(f"optim: {text}"), "_target_")
    refused(lambda: from_file(f"data: {{options: {{deep: [[{text}]]}}}}"), "_target_")
    refused(lambda: from_file(f"data.condition.buckets: [{text}]"), "_target_")
    refused(lambda: from_file(f"plugins: [{text}]"), "_target_")
    refused(lambda: from_file(f"optim: {{<<: {text}}}"))
    row = {"prompt": [{"role": "user", "content": "a", **made}], "chosen": "b", "rejected": "c", **made}
    with contextlib.suppress(DataError):
        to_sample(Row("f", 1, row), "auto")
    assert not canary.exists()
    assert sorted(path.name for path in canary.parent.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    "text", ["${oc.env:CANARY}", "${oc.env:CANARY,x}", "${env:CANARY}", "${oc.decode:1}", "$CANARY"]
)
def test_an_interpolation_stays_the_text_it_is(text: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "7f3a91")
    file = canary.parent / "run.yaml"
    file.write_text(f"logger.project: '{text}'\ndata.options: {{a: '{text}'}}\n")
    for config in (compose(BASE, file=file).config, compose([*BASE, f"logger.project={text}"]).config):
        assert config.logger.project == text
        assert "7f3a91" not in str(config)


@pytest.mark.parametrize(
    "key",
    ["hydra.run.dir", "hydra/launcher", "hydra.searchpath", "hydra.callbacks", "hydra/sweeper", "hydra.job.env_set",
     "hydra", "defaults", "override hydra/launcher", "@package", "~optim", "+model.x", "++seed"],
)  # fmt: skip
def test_hydras_own_keys_are_refused(key: str, canary: Path) -> None:
    file = canary.parent / "run.yaml"
    file.write_text(json.dumps({key: f"{canary}"}))
    refused(lambda: compose(BASE, file=file))
    refused(lambda: compose([*BASE, f"{key}={canary}"]))
    assert not canary.exists()


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


FILES = {
    **{f"aliases of {levels} levels": bomb(levels) for levels in range(3, 13)},
    "merge keys": "a: &a {x: 1}\nb: {<<: *a}",
    "python object": "!!python/object/apply:os.system ['touch canary']",
    "python name": "a: !!python/name:os.system",
    "python module": "a: !!python/module:os",
    "python tuple": "a: !!python/tuple [1]",
    "own tag": "a: !run touch",
    "set": "a: !!set {x}",
    "binary": "a: !!binary aGk=",
    "timestamp tag": "a: !!timestamp 2024-01-01",
    "scalar of 10 MB": "a: " + "x" * 10_000_000,
    "many values": "a: [" + "x," * 120_000 + "]",
    "many keys": "\n".join(f"k{n}: 1" for n in range(25_000)),
    "deep lists": "a: " + "[" * 50_000,
    "deep maps": "a: " + "{a: " * 5_000,
    "deep blocks": "\n".join("  " * n + "a:" for n in range(300)),
    "key twice": "seed: 1\nseed: 2",
    "key twice inside": "optim: {eps: 1, eps: 2}",
    "a list as key": "? [a]\n: 1",
    "two documents": "seed: 1\n---\nseed: 2",
    "huge number": "seed: " + "9" * 200_000,
    "control characters": "a: \x07",
    "long token": "a: sk-" + "x" * 200_000,
    "quadratic address": "a: " + "a" * 200_000,
    "quadratic jwt": "a: " + "eyJ-" * 50_000,
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_two_seconds(name: str, canary: Path) -> None:
    file = canary.parent / "hostile.yaml"
    file.write_text(FILES[name])
    started = time.process_time()
    said = refused(lambda: compose(BASE, file=file))
    assert time.process_time() - started <= 2.0
    assert len(said) < 1000
    assert not canary.exists()


def test_a_file_of_ordinary_size_is_read() -> None:
    text = "\n".join(f"k{n}: [1, 2]" for n in range(2000))
    assert len(yamlio.parse(text, "x")) == 2000
    with pytest.raises(ConfigError, match="256 KB"):
        yamlio.parse("x" * (yamlio.MAX_BYTES + 1), "x")


@pytest.mark.parametrize(
    "text", ["a" * 3_000_000, "eyJ-" * 500_000, "://" * 1_000_000, "?key=" * 500_000, "-" * 3_000_000]
)
def test_redacting_foreign_text_takes_no_quadratic_time(text: str) -> None:
    started = time.process_time()
    checks.redact(text)
    assert time.process_time() - started < 20.0


def test_a_file_cannot_ask_for_foreign_code(canary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = canary.parent / "theirs.yaml"
    for content in (
        "model.trust_remote_code: true",
        "model: {trust_remote_code: true}",
        "model: {trust_remote_code: 1}",
    ):
        file.write_text(content)
        said = refused(lambda: compose(BASE, file=file), "theirs.yaml", "on the command line")
        assert len(said.splitlines()) == 1
    file.write_text("model.trust_remote_code: true")
    assert compose([*BASE, "model.trust_remote_code=false"], file=file).config.model.trust_remote_code is False
    file.write_text("model: {trust_remote_code: true}")
    assert compose([*BASE, "model.trust_remote_code=true"], file=file).config.model.trust_remote_code is True
    assert main(["train", str(file), *BASE]) == 2
    assert "trust_remote_code=true on the command line" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evil/kernel", "evil/kernel@main", "evil/kernel:fn", "paged|evil/kernel", "../x"])
def test_attention_code_from_the_hub_is_refused(name: str) -> None:
    refused(lambda: compose([*BASE, f"model.attn_implementation={name}"]), "attn_implementation")
    assert compose([*BASE, "model.attn_implementation=flash_attention_2"]).config.model.attn_implementation


def test_foreign_code_from_the_hub_needs_a_commit() -> None:
    asked = ["model=owner/name", "data=sums", "objective=dpo", "model.trust_remote_code=true"]
    refused(lambda: compose(asked), "model.revision")
    refused(lambda: compose([*asked, "model.revision=main"]), "model.revision")
    assert compose([*asked, f"model.revision={'0f' * 20}"]).config.model.trust_remote_code
