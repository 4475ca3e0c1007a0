"""Tokenizers by the names of their models, and whether their ids fit a model and one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignlab.config import ModelConfig
from alignlab.errors import ConfigError
from alignlab.models.source import TOKENIZER_FILES, folder_of, one_line


def load_tokenizer(config: ModelConfig) -> Any:
    """The fast tokenizer of ``config``, None where the folder holds none."""
    name = config.tokenizer_name_or_path or config.name_or_path
    if name == "tiny":
        from alignlab.models import tiny

        return tiny.tokenizer()
    source = folder_of(config, name)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        if config.tokenizer_name_or_path:
            raise ConfigError(f"model.tokenizer_name_or_path: {source} holds no tokenizer")
        return None
    from transformers import AutoTokenizer

    with one_line("tokenizer", name):
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, use_fast=True
        )


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """ConfigError where the tokenizer (None: nothing to check) has ids without a row in the embedding of ``name``."""
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
