"""Turns as a chat template takes them: without what is ours alone, and as many conversations as have to be rendered."""

from __future__ import annotations

import json

from alignlab.data.examples import target_turns
from alignlab.errors import DataError
from alignlab.types import Message, Sequence


def conversations(sequence: Sequence, whole: bool) -> list[tuple[list[Message], list[int]]]:
    """Turns with the places of the target turns: all at once (``whole``), or one path for each target turn."""
    before: list[Message] = sequence.prompt if isinstance(sequence.prompt, list) else []
    after: list[Message] = sequence.completion if isinstance(sequence.completion, list) else []
    wanted = {id(turn) for turn in target_turns(after)}
    turns = [*before, *after]
    targets = [i for i, turn in enumerate(turns) if i >= len(before) and id(turn) in wanted]
    turns = clean(turns[: targets[-1] + 1])
    return [(turns, targets)] if whole else [(turns[: i + 1], [i]) for i in targets]


def clean(turns: list[Message]) -> list[Message]:
    """Turns as templates take them: no nulls, no marks of ours, a call's arguments as an object."""
    return [_turn(turn) for turn in turns]


def _turn(turn: Message) -> Message:
    made = {name: value for name, value in turn.items() if value is not None and name != "weight"}
    for i, call in enumerate(made.get("tool_calls") or []):
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise DataError(f"tool_calls[{i}].arguments is no JSON: {arguments[:40]!r}") from None
        made["tool_calls"] = [
            *made["tool_calls"][:i],
            {"type": "function", **call, "function": {**function, "arguments": arguments or {}}},
            *made["tool_calls"][i + 1 :],
        ]
    return made
