"""Where a model's files are (built in, a folder, the hub) and what its configuration says; no weights are loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignlab.config import ModelConfig
from alignlab.data import hub
from alignlab.errors import ConfigError
from alignlab.models.foreign import broken_file, check_folder

BUILT_IN = ("tiny", "smollm2")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
WITHOUT_A_HEAD = (
    "without a head that gives a reward; name a sequence-classification model with one label, e.g. the model/ folder "
    "of a run with objective=reward"
)


def fetch(config: ModelConfig) -> None:
    """Bring the model and its tokenizer here (download, convert), so that loading them opens no connection."""
    for name in (config.name_or_path, config.tokenizer_name_or_path):
        if name not in (None, "tiny"):
            folder_of(config, name, weights=name == config.name_or_path)


def at_hand(config: ModelConfig, name: str | None = None) -> Path | None:
    """The folder of a model that needs no download, None for one that does; ConfigError where it is no model.

    Not for ``tiny``, which has no folder.
    """
    name = name or config.name_or_path
    if name.count("/") <= 1 and not Path(os.path.expanduser(name)).exists() and name not in BUILT_IN:
        found = _local_snapshot(name, config.revision)
        if found is None or not _whole(found, weights=False):
            return None
        check_folder(found, weights=False)
        return found
    return Path(folder_of(config, name))


def configuration(config: ModelConfig) -> Any:
    """The Hugging Face configuration of a model that is :func:`at_hand`, None of one that is not."""
    found = at_hand(config)
    return None if found is None else hf_configuration(config, str(found))


def shape(config: ModelConfig) -> Any:
    """The Hugging Face configuration of a model; its small files are fetched where they are not here, never weights."""
    if config.name_or_path == "tiny":
        from alignlab.models import tiny

        return tiny.config(len(tiny.tokenizer()))
    return hf_configuration(config, folder_of(config))


def max_positions(config: ModelConfig) -> int | None:
    """The model's number of positions; None where its configuration states none."""
    text = shape(config).get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def model_folder(config: ModelConfig) -> str:
    """The checked folder that holds the model, for a program that loads it by itself; ConfigError for ``tiny``."""
    if config.name_or_path == "tiny":
        raise ConfigError("model=tiny is made in memory; other programs need a folder, e.g. a run's model/")
    return folder_of(config, weights=True)


def check_reward_model(config: ModelConfig) -> None:
    """ConfigError unless ``config`` names a sequence classifier with one label, whose weights hold its head.

    Where a policy is trained into a reward model a new head is right; where rewards are read it would be noise.
    """
    name = config.name_or_path
    if name == "tiny":
        raise ConfigError(f"rm: tiny is a language model {WITHOUT_A_HEAD}")
    hf = hf_configuration(config, folder_of(config))
    kinds = list(hf.architectures or [])
    if not any("SequenceClassification" in kind for kind in kinds):
        raise ConfigError(f"rm: {name} is {kinds[0] if kinds else 'a language model'} {WITHOUT_A_HEAD}")
    if hf.num_labels != 1:
        raise ConfigError(f"rm: {name} has {hf.num_labels} labels; a reward model has one")


def has_stored_head(shape: Any, head: str, name: str) -> bool:
    """Whether the folder of this configuration holds a scalar head; ConfigError where a language model is needed."""
    stored = any("SequenceClassification" in kind for kind in shape.architectures or [])
    if head == "lm" and stored:
        raise ConfigError(f"model: {name} is a reward model; this objective needs a language model")
    return stored


def fingerprint_of(folder: Path, config: ModelConfig) -> str:
    """Of the configuration and the weight files' contents."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    digest.update(json.dumps([config.trust_remote_code, (folder / "config.json").read_text()]).encode())
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def folder_of(config: ModelConfig, name: str | None = None, *, weights: bool = False) -> str:
    """The folder of a model; a hub model is downloaded and ``smollm2`` converted the first time, without a need for
    ``weights`` only the small files."""
    name = name or config.name_or_path
    if name == "smollm2":
        from alignlab.models import smollm2

        return str(smollm2.folder())
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "tokenizer.json").is_file():
            raise ConfigError(f"model: {name} is no model folder (no config.json); built in: {', '.join(BUILT_IN)}")
        check_folder(path, weights=weights)
        return str(path)
    if path.is_file() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ConfigError(f"model: no model folder at {name}; give a folder, a hub name, or {' or '.join(BUILT_IN)}")
    found = _snapshot(name, config.revision, weights)
    check_folder(found, weights=weights)
    return str(found)


def _snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """The local snapshot of a hub model.  Files that are here already are used as they are, without asking the hub."""
    from huggingface_hub import snapshot_download

    found = _local_snapshot(name, revision)
    if found is not None and _whole(found, weights):
        return found
    wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        hub.commit("model", name, revision)  # so that a hub which does not answer is known in seconds
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        if found is not None:  # offline, and no tokenizer in the model's repository
            return found
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"built in: {', '.join(BUILT_IN)}"
        raise ConfigError(
            f"model: no folder {name} here, and the hub model cannot be fetched ({type(error).__name__}); {hint}"
        ) from error


def _local_snapshot(name: str, revision: str | None) -> Path | None:
    """What of a hub model is here already."""
    from huggingface_hub import snapshot_download

    with suppress(OSError, ValueError):
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    return None


def _whole(folder: Path, weights: bool) -> bool:
    """Whether a snapshot holds a configuration, a tokenizer and (``weights``) every weight file."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    index = folder / "model.safetensors.index.json"
    if not weights:
        return True
    if index.is_file():
        return all((folder / file).is_file() for file in json.loads(index.read_text())["weight_map"].values())
    return any(folder.glob("*.safetensors"))


def hf_configuration(config: ModelConfig, source: str) -> Any:
    """The Hugging Face configuration in the folder ``source``; its own Python runs only where ``config`` trusts it."""
    from transformers import AutoConfig

    with one_line("configuration", config.name_or_path):
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)


@contextmanager
def one_line(what: str, name: str) -> Iterator[None]:
    """What loading ``what`` of the model ``name`` raises, as a ConfigError of one line that names the faulty file."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "custom code" in str(error):
            first = "it needs its own Python; if you trust it, put model.trust_remote_code=true on the command line"
        elif broken := broken_file(Path(os.path.expanduser(name))):
            first = f"{broken.name}: {first}"
        raise ConfigError(f"model: the {what} of {name} cannot be loaded: {first}") from error
