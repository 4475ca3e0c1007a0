"""Models and tokenizers by name: built-in ones, folders, hub names; safetensors only, no code of foreign origin."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from alignlab.config import ModelConfig
from alignlab.data import hub
from alignlab.errors import ConfigError
from alignlab.models.foreign import broken_file, check_folder
from alignlab.models.head import ScalarHead

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BUILT_IN = ("tiny", "smollm2")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
WITHOUT_A_HEAD = (
    "without a head that gives a reward; name a sequence-classification model with one label, e.g. the model/ folder "
    "of a run with objective=reward"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Loaded:
    """A model on the host with its tokenizer (None for a folder that has none)."""

    model: Any
    tokenizer: Any
    name: str
    dtype: torch.dtype
    identify: Callable[[], str]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights as they were loaded: part of the key of cached reference numbers.

        Reads every weight file, so it is made when first asked for.
        """
        return self.identify()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU (the engines keep fp32 master weights)."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"model.dtype: '{name}' is none of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(config: ModelConfig, head: str, dtype: torch.dtype, seed: int) -> Loaded:
    """The model of ``config`` with the head an objective needs.

    ``lm``: a causal language model.  ``scalar``: a sequence-classification model with one label; where the folder holds
    a causal model the backbone is loaded and the head made anew from ``seed``, without bias, in float32.  Raises
    ConfigError for a name that cannot be loaded, weights that are missing, and a tokenizer larger than the embedding.
    """
    tokenizer = load_tokenizer(config)
    if config.name_or_path == "tiny":
        model = _tiny(head, dtype, seed)
        text = model.config.to_json_string()

        def identify() -> str:
            return hashlib.sha256(f"{text}/{head}/{seed}".encode()).hexdigest()
    else:
        source = _source(config, weights=True)
        _no_bars()
        model = _pretrained(config, source, head, dtype, seed)

        def identify() -> str:
            return f"{_fingerprint(Path(source), config)}/{head}/{seed if head == 'scalar' else ''}"

    model.config.use_cache = False
    _check_vocabulary(model, tokenizer, config.name_or_path)
    return Loaded(model, tokenizer, config.name_or_path, dtype, identify)


def fetch(config: ModelConfig) -> None:
    """Bring the model and its tokenizer here (download, convert), so that loading them opens no connection."""
    for name in (config.name_or_path, config.tokenizer_name_or_path):
        if name not in (None, "tiny"):
            _source(config, name, weights=name == config.name_or_path)


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
    return Path(_source(config, name))


def configuration(config: ModelConfig) -> Any:
    """The Hugging Face configuration of a model that is :func:`at_hand`, None of one that is not."""
    found = at_hand(config)
    return None if found is None else _hf_config(config, str(found))


def shape(config: ModelConfig) -> Any:
    """The Hugging Face configuration of a model; its small files are fetched where they are not here, never weights."""
    if config.name_or_path == "tiny":
        from alignlab.models import tiny

        return tiny.config(len(tiny.tokenizer()))
    return _hf_config(config, _source(config))


def model_folder(config: ModelConfig) -> str:
    """The checked folder that holds the model, for a program that loads it by itself; ConfigError for ``tiny``."""
    if config.name_or_path == "tiny":
        raise ConfigError("model=tiny is made in memory; other programs need a folder, e.g. a run's model/")
    return _source(config, weights=True)


def load_tokenizer(config: ModelConfig) -> Any:
    """The fast tokenizer of ``config``, None where the folder holds none."""
    name = config.tokenizer_name_or_path or config.name_or_path
    if name == "tiny":
        from alignlab.models import tiny

        return tiny.tokenizer()
    source = _source(config, name)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        if config.tokenizer_name_or_path:
            raise ConfigError(f"model.tokenizer_name_or_path: {source} holds no tokenizer")
        return None
    from transformers import AutoTokenizer

    with _one_line("tokenizer", name):
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, use_fast=True
        )


def max_positions(config: ModelConfig) -> int | None:
    """The model's number of positions; None where its configuration states none."""
    text = shape(config).get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and routing jitter to 0: log-probabilities of policy and reference must be of one function.

    The configuration keeps its values, so an exported model has them still.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop", "jitter")):
                setattr(module, name, 0.0)


def _source(config: ModelConfig, name: str | None = None, *, weights: bool = False) -> str:
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


@contextmanager
def _one_line(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "custom code" in str(error):
            first = "it needs its own Python; if you trust it, put model.trust_remote_code=true on the command line"
        elif broken := broken_file(Path(os.path.expanduser(name))):
            first = f"{broken.name}: {first}"
        raise ConfigError(f"model: the {what} of {name} cannot be loaded: {first}") from error


def _no_bars() -> None:
    """Weights are read and written in silence from here on; a download, before, shows its progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _hf_config(config: ModelConfig, source: str) -> Any:
    from transformers import AutoConfig

    with _one_line("configuration", config.name_or_path):
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)


def check_reward_model(config: ModelConfig) -> None:
    """ConfigError unless ``config`` names a sequence classifier with one label, whose weights hold its head.

    Where a policy is trained into a reward model a new head is right; where rewards are read it would be noise.
    """
    name = config.name_or_path
    if name == "tiny":
        raise ConfigError(f"rm: tiny is a language model {WITHOUT_A_HEAD}")
    hf = _hf_config(config, _source(config))
    kinds = list(hf.architectures or [])
    if not any("SequenceClassification" in kind for kind in kinds):
        raise ConfigError(f"rm: {name} is {kinds[0] if kinds else 'a language model'} {WITHOUT_A_HEAD}")
    if hf.num_labels != 1:
        raise ConfigError(f"rm: {name} has {hf.num_labels} labels; a reward model has one")


def _pretrained(config: ModelConfig, source: str, head: str, dtype: torch.dtype, seed: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {
        "revision": config.revision, "trust_remote_code": config.trust_remote_code, "use_safetensors": True,
        "attn_implementation": config.attn_implementation, "dtype": dtype, "output_loading_info": True,
    }  # fmt: skip
    if head == "scalar":
        options["num_labels"] = 1
    hf = _hf_config(config, source)
    stored_head = has_stored_head(hf, head, config.name_or_path)
    with _one_line("model", config.name_or_path):
        try:
            model, report = kind.from_pretrained(source, **options)
        except ValueError as error:
            # Families with attention sinks have no kernel of torch's for padded rows; eager is theirs.
            if config.attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            model, report = kind.from_pretrained(source, **options | {"attn_implementation": "eager"})
    missing = sorted(
        set(report["missing_keys"]) - ({"score.weight"} if head == "scalar" and not stored_head else set())
    )
    missing += [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ConfigError(
            f"model: {config.name_or_path} lacks the weights {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    if head == "scalar":
        _scalar_head(model, seed, keep=stored_head)
    return model


def has_stored_head(shape: Any, head: str, name: str) -> bool:
    """Whether the folder of this configuration holds a scalar head; ConfigError where a language model is needed."""
    stored = any("SequenceClassification" in kind for kind in shape.architectures or [])
    if head == "lm" and stored:
        raise ConfigError(f"model: {name} is a reward model; this objective needs a language model")
    return stored


def _tiny(head: str, dtype: torch.dtype, seed: int) -> Any:
    from alignlab.models import tiny

    causal, _ = tiny.load(seed)
    model: Any = causal
    if head == "scalar":
        from transformers import AutoModelForSequenceClassification

        causal.config.num_labels = 1
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForSequenceClassification.from_config(causal.config)
        model.base_model.load_state_dict(causal.base_model.state_dict())
        _scalar_head(model, seed, keep=False)
    for parameter in model.parameters():  # buffers keep their dtype: rotary frequencies in bfloat16 are other positions
        parameter.data = parameter.data.to(dtype)
    return model


def _scalar_head(model: Any, seed: int, *, keep: bool) -> None:
    """A bias-free scalar head in float32; a new one is drawn from ``seed`` with deviation 1 / sqrt(hidden + 1).

    With a bias the absolute terms of the Eurus objective could move zero instead of the rewards.
    """
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(
            f"reward models of the family {type(model).__name__} are not supported: no linear 'score' head"
        )
    old = model.score
    dtype = torch.promote_types(old.weight.dtype, torch.float32)
    head = nn.utils.skip_init(ScalarHead, old.in_features, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        if keep:
            head.weight.copy_(old.weight)
        else:
            generator = torch.Generator().manual_seed(seed)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (old.in_features + 1) ** 0.5)
    model.score = head


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ConfigError(f"model: the tokenizer of {name} has ids up to {highest}, the embedding only {rows} rows")


def check_same_tokens(ours: Any, theirs: Any, name: str) -> None:
    """ConfigError where a token id is not the same token to two tokenizers (None: nothing to compare).

    What a row of ids says to one model it must say to the other.  Tokens that only one of them has added (a reserved
    place that was given a name) are no difference.
    """
    if ours is None or theirs is None:
        return
    mine, other = ours.get_vocab(), theirs.get_vocab()
    added = {*ours.added_tokens_decoder, *theirs.added_tokens_decoder}
    base = {i: token for token, i in other.items() if i not in added}
    for token, i in sorted(mine.items(), key=lambda item: item[1]):
        if other.get(token, i) != i or (i not in added and base.get(i, token) != token):
            said = f"{other[token]}" if token in other else f"none, and {i} is {base[i]!r}"
            raise ConfigError(
                f"model: {name} has another tokenizer than the policy: token {token!r} is {i} here and {said} there"
            )


def check_token_ids(model: Any, largest: int, place: str, name: str) -> None:
    """ConfigError where a row (at ``place``) holds a token id that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ConfigError(f"{place}: token id {largest}, but the embedding of {name} has only {rows} rows")


def _fingerprint(folder: Path, config: ModelConfig) -> str:
    """Of the configuration and the weight files' contents."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    digest.update(json.dumps([config.trust_remote_code, (folder / "config.json").read_text()]).encode())
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
