"""Nothing that is read can run code: not weights, not checkpoints, not caches, not data, not a model's own Python."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from alignlab.config import ModelConfig
from alignlab.configuration.frozen import load_frozen
from alignlab.configuration.plugins import load_copies
from alignlab.data.index import Index
from alignlab.data.rows import read_rows
from alignlab.engine import checkpoint
from alignlab.engine.shards import ShardReader, read_parameters
from alignlab.errors import AlignlabError
from alignlab.models import tiny
from alignlab.models.load import load_model
from alignlab.models.source import max_positions
from alignlab.models.tokens import load_tokenizer
from alignlab.runfolder import RunFolder
from alignlab.train import reference


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class State:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return (os.system, (self.command,), {"x": 1})


def _torch(value: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def _tar(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _zip(content: bytes, name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def _numpy(value: Any, many: bool = False) -> bytes:
    stream = io.BytesIO()
    array = np.array([value], dtype=object)
    if many:
        np.savez(stream, sequences=array, pairs=array, pair_values=array)
    else:
        np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Twenty files that create ``canary`` when a loader trusts them."""
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w').close()"
    system, run = Call(os.system, touch), Call(eval, write)
    stacked = Call(getattr, Call(__import__, "os"), "system")
    found: dict[str, bytes] = {f"os.system, protocol {n}": pickle.dumps(system, protocol=n) for n in range(6)}
    found |= {
        "eval": pickle.dumps(run),
        "exec": pickle.dumps(Call(exec, write)),
        "subprocess": pickle.dumps(Call(subprocess.call, ["touch", str(canary)])),
        "partial": pickle.dumps(Call(partial(os.system, touch))),
        "getattr": pickle.dumps(Call(map, stacked, [touch])),
        "text opcodes": b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "nested": pickle.dumps({"state": [{"a": (system,)}], "weight": np.zeros(2)}),
        "state": pickle.dumps(State(touch)),
        "torch zip": _torch({"weight": torch.zeros(2), "extra": system}),
        "torch legacy": _torch({"weight": torch.zeros(2), "extra": run}, legacy=True),
        "torch legacy tar": _tar(pickle.dumps(system)),
        "zip data.pkl": _zip(pickle.dumps(system), "archive/data.pkl"),
        "numpy object": _numpy(system),
        "numpy archive": _numpy(run, many=True),
        "gzip": gzip.compress(pickle.dumps(system)),
    }
    return found


NAMES = list(payloads(Path("x")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made, tokenizer = tiny.load()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "canary"


def sealed(folder: Path, files: dict[str, bytes]) -> Path:
    """A checkpoint whose manifest is right: its maker could compute hashes."""

    def write(staging: Path) -> None:
        for name, content in files.items():
            (staging / name).write_bytes(content)

    return checkpoint.publish(folder.parent, int(folder.name.split("-")[1]), write).path


def test_there_are_twenty_payloads_that_work(tmp_path: Path) -> None:
    """A loader that trusts them is caught; else this file would prove nothing."""
    assert len(NAMES) >= 20
    for name in ("eval", "text opcodes", "nested"):
        target = tmp_path / "target"
        pickle.loads(payloads(target)[name])
        assert target.exists(), name
        target.unlink()


Reader = Callable[[Path, Path, bytes], tuple[Callable[[], Any], str]]


def shard(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = sealed(root / "checkpoint-1", {"shard-00000.safetensors": content, "engine.json": b"{}"})
    assert checkpoint.verify(folder)
    return lambda: ShardReader(folder), "shard-00000.safetensors"


def engine_state(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = sealed(root / "checkpoint-1", {"engine.json": content})
    return lambda: read_parameters(folder), "engine.json"


def manifest(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = sealed(root / "checkpoint-1", {})
    (folder / "MANIFEST.json").write_bytes(content)
    return lambda: checkpoint.verify(folder), "MANIFEST.json"


def optimizer(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = sealed(root / "checkpoint-1", {"engine.json": b"{}"})
    (folder / "optimizer.pt").write_bytes(content)
    return lambda: checkpoint.verify(folder), "optimizer.pt"


def in_model(name: str, *removed: str) -> Reader:
    def place(root: Path, model: Path, content: bytes) -> tuple[Callable[[], Any], str]:
        folder = root / "model"
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns(*removed) if removed else None)
        (folder / name).write_bytes(content)
        return lambda: load_model(ModelConfig(str(folder)), "lm", torch.float32, 0), name

    return place


def adapter(root: Path, model: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = root / "model"
    shutil.copytree(model, folder)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(content)
    return lambda: load_model(ModelConfig(str(folder)), "lm", torch.float32, 0), "adapter_config.json"


def weight_map(root: Path, model: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = root / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "part.bin").write_bytes(content)
    names = dict.fromkeys(tiny.load()[0].state_dict(), "part.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return lambda: load_model(ModelConfig(str(folder)), "lm", torch.float32, 0), "part.bin"


def index(name: str) -> Reader:
    def place(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
        from alignlab.data.index import FORMAT

        folder = root / "index"
        folder.mkdir()
        arrays = {"tokens": {"file": "tokens.bin", "dtype": "int32", "count": 1, "sha256": ""}}
        text = {"format": FORMAT, "arrays": arrays, "sources": [], "counts": {"sample": 0}, "hash": ""}
        (folder / "meta.json").write_text(json.dumps(text))
        (folder / name).write_bytes(content)
        return lambda: Index.open(folder), "index" if name == "meta.json" else name

    return place


def numbers(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
    folder = root / "reference"
    folder.mkdir()
    (folder / "logps.npz").write_bytes(content)
    return lambda: reference._read(folder, 0.0), "logps.npz"


def data(name: str) -> Reader:
    def place(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
        (root / name).write_bytes(content)
        return lambda: list(read_rows(str(root / name))), name

    return place


def run_file(name: str, read: Callable[[Path], Any]) -> Reader:
    def place(root: Path, _: Path, content: bytes) -> tuple[Callable[[], Any], str]:
        (root / name).write_bytes(content)
        return lambda: read(root), name

    return place


PLACES: dict[str, Reader] = {
    "checkpoint shard": shard,
    "checkpoint engine.json": engine_state,
    "checkpoint manifest": manifest,
    "checkpoint optimizer.pt": optimizer,
    "model pytorch_model.bin alone": in_model("pytorch_model.bin", "*.safetensors"),
    "model consolidated.pth alone": in_model("consolidated.pth", "*.safetensors"),
    "model weights": in_model("model.safetensors"),
    "model config.json": in_model("config.json"),
    "model tokenizer.json": in_model("tokenizer.json"),
    "model adapter_model.bin": adapter,
    "model weight map": weight_map,
    "index meta.json": index("meta.json"),
    "index array": index("tokens.bin"),
    "reference numbers": numbers,
    "data .pkl": data("rows.pkl"),
    "data .pt": data("rows.pt"),
    "data .arrow": data("rows.arrow"),
    "data .npy": data("rows.npy"),
    "data .parquet": data("rows.parquet"),
    "data .jsonl": data("rows.jsonl"),
    "data .jsonl.gz": data("rows.jsonl.gz"),
    "data .json": data("rows.json"),
    "run.yaml": run_file("run.yaml", load_frozen),
    "status.json": run_file("status.json", lambda root: RunFolder(root).status()),
    "plugins.json": run_file("plugins.json", load_copies),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_is_refused_by_the_files_name(place: str, tmp_path: Path, canary: Path, model: Path) -> None:
    for number, (name, content) in enumerate(payloads(canary).items()):
        root = tmp_path / str(number)
        root.mkdir()
        read, file = PLACES[place](root, model, content)
        with pytest.raises(AlignlabError) as error:
            read()
        assert file in str(error.value), (name, str(error.value))
        assert error.value.exit_code in (2, 4)
        assert len(str(error.value).splitlines()) == 1
        assert not canary.exists(), name


@pytest.mark.parametrize(
    "file", ["training_args.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
)
def test_files_of_other_trainers_beside_good_weights_are_not_read(
    file: str, tmp_path: Path, canary: Path, model: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    for content in payloads(canary).values():
        (tmp_path / "model" / file).write_bytes(content)
        assert load_model(ModelConfig(str(tmp_path / "model")), "lm", torch.float32, 0).model is not None
        assert not canary.exists()


def test_an_arrow_extension_type_is_not_unpickled(tmp_path: Path, canary: Path) -> None:
    field = pyarrow.field("prompt", pyarrow.string(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": payloads(canary)["os.system, protocol 2"],
    })  # fmt: skip
    table = pyarrow.table([["a"]], schema=pyarrow.schema([field]))
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert [row.value for row in read_rows(str(tmp_path / "rows.parquet"))] == [{"prompt": "a"}]
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------------------------
# A model's own Python
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, model: Path, canary: Path) -> Path:
    """A model folder of a class of its own, whose module creates the canary when it is imported."""
    folder = tmp_path / "remote"
    shutil.copytree(model, folder)
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def probe(
    folder: Path, where: Path, *more: str, answer: str | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignlab", "inspect", *more, f"model={folder}", "data=sums", "objective=sft",
         "engine=local", "train.max_steps=1", "train.global_batch_size=1", "data.options={rows: 2}",
         f"output_dir={where / 'runs'}"],
        input=answer, stdin=subprocess.DEVNULL if answer is None else None, cwd=where, text=True, timeout=240,
        capture_output=True, env={**os.environ, "HF_MODULES_CACHE": str(where / "modules"), **environment},
    )  # fmt: skip


ROUTES: dict[str, dict[str, Any]] = {
    "stdin says yes": {"answer": "y\n" * 50},
    "a file asks": {"answer": None, "file": "model: {trust_remote_code: true}"},
    "stdin closed, the environment asks": {
        "answer": None, "HF_HUB_TRUST_REMOTE_CODE": "1", "TRUST_REMOTE_CODE": "true",
        "HF_DATASETS_TRUST_REMOTE_CODE": "1",
    },
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_a_models_own_python_does_not_run(route: str, tmp_path: Path, remote: Path, canary: Path) -> None:
    settings = dict(ROUTES[route])
    files = []
    if content := settings.pop("file", None):
        (tmp_path / "theirs.yaml").write_text(content)
        files = ["theirs.yaml"]
    done = probe(remote, tmp_path, *files, **settings)
    assert done.returncode == 2, done.stderr
    assert "model.trust_remote_code=true on the command line" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "[y/N]" not in done.stdout + done.stderr
    assert not canary.exists()


def test_it_runs_when_the_operator_says_so(
    tmp_path: Path, remote: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the canary works."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert max_positions(ModelConfig(str(remote), trust_remote_code=True))
    assert canary.exists()


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("name", ["evil/kernel", "evil/kernel@main:attention", "flash|evil/kernel"])
def test_a_config_cannot_name_attention_code_on_the_hub(
    key: str, name: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: asked.append(a))
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: name}))
    with pytest.raises(AlignlabError, match=r"config\.json.*names code on the hub"):
        load_model(ModelConfig(str(folder)), "lm", torch.float32, 0)
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {key: {"": name}}}))
    with pytest.raises(AlignlabError, match=r"config\.json.*names code on the hub"):
        load_tokenizer(ModelConfig(str(folder)))
    assert not asked


def test_good_weights_are_read(tmp_path: Path) -> None:
    """The negative control of the places above: safetensors and JSON of the same names are no error."""
    save_file({"param:0:w": torch.zeros(3)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    folder = sealed(
        tmp_path / "checkpoint-1", {"shard-00000.safetensors": content, "engine.json": b'{"shapes": {"w": [3]}}'}
    )
    assert read_parameters(folder)["w"].tolist() == [0.0] * 3
