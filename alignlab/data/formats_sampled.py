"""What ``alignlab sample`` prints: a prompt and the texts that a model answered, one row a prompt."""

from __future__ import annotations

from typing import Any

from alignlab.data import fields
from alignlab.data.fields import assistant, bad, common, messages, need
from alignlab.types import Sample, Sequence


def from_sampled(row: dict[str, Any]) -> Sample:
    """``prompt`` (text or turns), ``texts``: one sequence each, none preferred; ``measures`` are not read."""
    asked, texts = need(row, "prompt"), need(row, "texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise bad("texts", "must be a list of texts", texts)
    if isinstance(asked, str) and not fields.is_turns(asked):
        return common(row, Sample([Sequence(asked, text) for text in texts]))
    prompt = messages("prompt", asked)
    return common(row, Sample([Sequence(prompt, [assistant(text)]) for text in texts]))
