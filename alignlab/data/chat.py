"""A chat template at work: conversations as text, and which stretches of that text the assistant has to write.

Two facts about templates shape this.  Many have no markers of their own around assistant turns, so the stretches are
found by rendering: a turn starts where the generation prompt ends and ends where the next turn's text starts.  And a
rendered prefix of a conversation need not be a prefix of the rendered conversation (thinking templates drop earlier
reasoning when a turn is added), so where prefixes fail the turn's own text is located by marks put into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from alignlab.data import sandbox
from alignlab.data.render_child import TODAY
from alignlab.data.sandbox import Refused
from alignlab.errors import DataError
from alignlab.types import Message

_PRIVATE = [chr(code) for code in range(0xE000, 0xE100)]
_THINK = re.compile(r"(</?think(?:ing)?>)")

Span = tuple[int, int]


class ControlToken(Refused):
    """Text that has no roles spells a token that only a template may write."""

    reason = "control_token"


@dataclass(frozen=True, slots=True)
class Path:
    """A rendered conversation.  ``targets``: [start, end) of what each target turn has to write, in order;
    ``text_only``: stretches of content that spell a control token and must not become one."""

    text: str
    targets: tuple[Span, ...] = ()
    text_only: tuple[Span, ...] = ()


class Chat:
    """One tokenizer's chat template, or another one with the same tokenizer.  ``template`` is the text that is saved
    with the model; ``name`` is for people."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        name = ""
        if template is not None and "{" not in template and "\n" not in template:
            if not os.path.isfile(template):
                raise DataError(f"model.chat_template: no such file '{template}', and no template's text either")
            name = os.path.splitext(os.path.basename(template))[0]
            with open(template, encoding="utf-8") as stream:
                template = stream.read()
        if template is None and isinstance(tokenizer.chat_template, dict):
            template = tokenizer.chat_template.get("default")
        self.template: str | None = template if template is not None else tokenizer.chat_template
        text = self.template or ""
        self.name = f"{name or _family(text)}#{hashlib.sha256(text.encode()).hexdigest()[:4]}" if text else "none"
        self._always = {**tokenizer.special_tokens_map, "date_string": TODAY.strftime("%d %b %Y")}
        added = tokenizer.added_tokens_decoder.values()
        self._special = _any_of(token.content for token in added if token.special)
        self._control = _any_of(token.content for token in added if token.special or _is_markup(token.content))

    def render(self, messages: list[Message], tools: list[Any] | None, *, generation: bool = False) -> str:
        """The conversation as text, with the generation prompt behind it where asked.

        Raises :class:`Refused` where the template says no, :class:`DataError` where it fails.
        """
        if not self.template:
            raise DataError("the tokenizer has no chat template; name one with model.chat_template=FILE")
        try:
            return self._apply(messages, tools, generation)
        except sandbox.NeedsOtherTypes as error:
            # Templates disagree whether a call's arguments are an object or its JSON text.
            if not any(turn.get("tool_calls") for turn in messages):
                raise DataError(str(error)) from None
        try:
            return self._apply([_with_json_arguments(turn) for turn in messages], tools, generation)
        except sandbox.NeedsOtherTypes as error:
            raise DataError(str(error)) from None

    def _apply(self, messages: list[Message], tools: list[Any] | None, generation: bool) -> str:
        return sandbox.render(self.template or "", self._values(messages, tools, generation), self.name)

    def _values(self, messages: list[Message], tools: list[Any] | None, generation: bool) -> dict[str, Any]:
        """What a template is given: transformers' names."""
        return {
            **self._always,
            "messages": [_as_given(turn) for turn in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": generation,
        }

    def foresee(self, conversations: Iterable[tuple[list[Message], list[int], list[Any] | None]]) -> None:
        """Have the renderings that :meth:`path` and :meth:`words` begin with made in one exchange."""
        if not self.template:
            return
        wanted = []
        for messages, targets, tools in conversations:
            wanted += [(messages, tools, False), (self._marked(messages, "")[1], tools, False)]
            for i in targets:
                wanted += [(messages[:i], tools, True)] * (i > 0)
                wanted += [(messages[: i + 1], tools, False)] * (i + 1 < len(messages))
        sandbox.foresee(self.template, [self._values(*one) for one in wanted])

    def prompt(self, messages: list[Message], tools: list[Any] | None) -> Path:
        """A prompt with the generation prompt behind it."""
        return self._guarded(messages, tools, self.render(messages, tools, generation=True), generation=True)

    def path(self, messages: list[Message], targets: list[int], tools: list[Any] | None) -> Path:
        """A conversation with the stretches that the assistant turns at ``targets`` have to write.

        Raises :class:`DataError` where the template hides them: a mask is never guessed.
        """
        self.foresee([(messages, targets, tools)])
        full = self.render(messages, tools)
        found: list[Span] = []
        for i in targets:
            start, end = self._start(messages, i, tools, full), self._end(messages, i, tools, full)
            if start is None or end is None or not (found[-1][1] if found else 0) <= start < end:
                raise DataError(f"the chat template {self.name} does not show where assistant turn {i} starts and ends")
            self._check(messages[i], full[start:end], i)
            found.append((start, end))
        return replace(self._guarded(messages, tools, full), targets=tuple(found))

    def words(self, messages: list[Message], tools: list[Any] | None, full: str) -> list[tuple[Span, str]] | None:
        """Where each turn's own words stand in ``full``, their rendering, with the turn's role, in order of place.

        None where marking them changes what the template does.
        """
        marks, turns, roles = self._marked(messages, full)
        try:
            placed = marks.placed(self.render(turns, tools), full)
        except (Refused, DataError):  # the marked text's alone: ``full`` was rendered
            return None
        return None if placed is None else [(span, roles[number]) for number, span in placed]

    @staticmethod
    def _marked(messages: list[Message], full: str) -> tuple[_Marks, list[Message], list[str]]:
        """(marks, the turns with their own words marked, the role that speaks each mark)"""
        marks = _Marks(_text_pieces, full)
        turns: list[Message] = []
        roles: list[str] = []
        for turn in messages:
            turns.append(marks.turn(turn))
            roles += [str(turn["role"])] * (len(marks.texts) - len(roles))
        return marks, turns, roles

    def _check(self, turn: Message, written: str, i: int) -> None:
        said = _THINK.split(str(turn.get("content") or ""))[-1].strip()
        calls = [call["function"]["name"] for call in turn.get("tool_calls") or []]
        if any(text not in written for text in (said, *calls)):
            raise DataError(f"the chat template {self.name} does not write assistant turn {i} as it is ({said[:40]!r})")

    # Where a target starts and ends: first by prefixes, then by marks.

    def _start(self, messages: list[Message], i: int, tools: list[Any] | None, full: str) -> int | None:
        opened = self.render(messages[:i], tools, generation=True) if i else None
        if opened is not None and full.startswith(opened):
            return len(opened)
        around = self._around(messages, i, tools, full)
        if around is None:
            return None
        first = around[0]
        before = self._around(messages, i - 1, tools, full) if i else None
        floor = before[1] if before else 0
        supplied = self._supplied(messages[:i], tools, opened)
        if not supplied:
            if before is None:
                return None
            tail = self._tail(messages[:i], tools)
            return floor + len(tail) if tail is not None and full.startswith(tail, floor) else None
        place = full.rfind(supplied, floor, first)
        if place >= 0:
            return place + len(supplied)
        # The generation prompt opens something (an empty think block) that this turn was written without.
        header = full[floor:first]
        if any(header.endswith(supplied[:n]) for n in range(len(supplied), 0, -1)):
            return first
        return None

    def _end(self, messages: list[Message], i: int, tools: list[Any] | None, full: str) -> int | None:
        if i + 1 == len(messages):
            return len(full)
        closed = self.render(messages[: i + 1], tools)
        if full.startswith(closed):
            return len(closed)
        around, tail = self._around(messages, i, tools, full), self._tail(messages[: i + 1], tools)
        if around is None or tail is None:
            return None
        behind = full[around[1] : around[1] + len(tail)]
        shared = next((n for n, (a, b) in enumerate(zip(tail, behind, strict=False)) if a != b), len(behind))
        return around[1] + shared if tail[:shared].strip() or not tail.strip() else None

    def _supplied(self, before: list[Message], tools: list[Any] | None, opened: str | None) -> str | None:
        """What the generation prompt adds."""
        if opened is None:
            before = [{"role": "user", "content": "x"}]
            opened = self.render(before, tools, generation=True)
        closed = self.render(before, tools)
        return opened[len(closed) :] if opened.startswith(closed) else None

    def _tail(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        """What the template writes behind the last turn of a conversation."""
        full = self.render(messages, tools)
        around = self._around(messages, len(messages) - 1, tools, full)
        return None if around is None else full[around[1] :]

    def _around(self, messages: list[Message], i: int, tools: list[Any] | None, full: str) -> Span | None:
        """[first, last) of turn ``i``'s own text in ``full``; None where marking it changes what the template does."""
        marks = _Marks(_text_pieces, full)
        turns = [*messages[:i], marks.turn(messages[i]), *messages[i + 1 :]]
        spans = marks.locate(self.render(turns, tools), full)
        # A text that is written twice has no one place.
        return (spans[0][0], spans[-1][1]) if spans and len(spans) <= len(marks.texts) else None

    def special(self, text: str) -> tuple[Span, ...]:
        """Where ``text`` spells a special token."""
        return tuple(match.span() for match in self._special.finditer(text)) if self._special else ()

    def _guarded(self, messages: list[Message], tools: list[Any] | None, full: str, generation: bool = False) -> Path:
        """``full`` with the places where content spells a control token.

        In turns of others every control token stays text, in the assistant's only special ones do: what a
        demonstration writes as ``<think>`` is meant.
        """
        marks = _Marks(_whole, full)
        turns = []
        for turn in messages:
            marks.split = _splitter(self._special if turn["role"] == "assistant" else self._control)
            turns.append({name: value if name == "role" else marks.value(value) for name, value in turn.items()})
        marks.split = _splitter(self._control)
        tools = marks.value(tools)
        if not marks.texts:
            return Path(full)
        spans = marks.locate(self.render(turns, tools, generation=generation), full)
        if spans is None:
            raise Refused("content spells a control token that the template reads as its own")
        return Path(full, text_only=tuple(spans))


_Split = Callable[[str], list[tuple[str, bool]]]
"""A string in pieces, each with whether it is to be marked."""


class _Marks:
    """Pieces of strings replaced by marks, so that they can be found again in a rendered text."""

    def __init__(self, split: _Split, full: str) -> None:
        self.texts: list[str] = []
        self.split = split
        # Private-use characters, two that the text does not hold: a row must not be able to spell a mark.
        free = [mark for mark in _PRIVATE if mark not in full][:2]
        if len(free) < 2:
            raise Refused("content uses every private-use character")
        self._open, self._close = free
        self._pattern = re.compile(f"{self._open}([0-9]+){self._close}")

    def value(self, value: Any) -> Any:
        """``value`` with the pieces of every string in it marked."""
        if isinstance(value, str):
            return "".join(self._mark(piece) if marked else piece for piece, marked in self.split(value))
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def turn(self, turn: Message) -> Message:
        marked = {k: self.value(v) for k, v in turn.items() if k not in ("role", "tool_calls", "tool_call_id")}
        if turn.get("tool_calls"):
            marked["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._mark(call["function"]["name"])}}
                for call in turn["tool_calls"]
            ]
        return {**turn, **marked}

    def locate(self, rendered: str, full: str) -> list[Span] | None:
        """Where the marked pieces stand in ``full``; None unless ``rendered`` says the same."""
        placed = self.placed(rendered, full)
        return None if placed is None else [span for _, span in placed]

    def placed(self, rendered: str, full: str) -> list[tuple[int, Span]] | None:
        """As :meth:`locate`, each with its number in ``texts``."""
        built: list[str] = []
        spans: list[tuple[int, Span]] = []
        length = last = 0
        for mark in self._pattern.finditer(rendered):
            if int(mark[1]) >= len(self.texts):
                return None
            before, text = rendered[last : mark.start()], self.texts[int(mark[1])]
            built += [before, text]
            start = length + len(before)
            spans.append((int(mark[1]), (start, start + len(text))))
            length, last = start + len(text), mark.end()
        built.append(rendered[last:])
        return spans if "".join(built) == full else None

    def _mark(self, text: str) -> str:
        self.texts.append(text)
        return f"{self._open}{len(self.texts) - 1}{self._close}"


def _text_pieces(text: str) -> list[tuple[str, bool]]:
    """The stretches between think tags; space around them stays, since templates strip it."""
    pieces: list[tuple[str, bool]] = []
    for part in _THINK.split(text):
        core = part.strip()
        if not core or _THINK.fullmatch(part):
            pieces.append((part, False))
        else:
            at = part.index(core)
            pieces += [(part[:at], False), (core, True), (part[at + len(core) :], False)]
    return pieces


def _whole(text: str) -> list[tuple[str, bool]]:
    return [(text, False)]


def _splitter(pattern: re.Pattern[str] | None) -> _Split:
    if pattern is None:
        return _whole
    return lambda text: [(part, i % 2 == 1) for i, part in enumerate(pattern.split(text))]


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in texts if text.strip()}, key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _is_markup(text: str) -> bool:
    """Whether an added token that is not special structures a chat (``<think>``), rather than being a word or space."""
    return re.fullmatch(r"\s*[<\[].*[>\]]\s*", text, re.DOTALL) is not None


def _with_json_arguments(turn: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn.get("tool_calls") or []
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _as_given(turn: Message) -> Message:
    """``turn`` as transformers hands it to a template: no nulls, reasoning under all names that templates read."""
    made = {name: value for name, value in turn.items() if value is not None}
    reasoning = next((made[name] for name in ("reasoning_content", "thinking", "reasoning") if name in made), None)
    return made if reasoning is None else {"thinking": reasoning, **made, "reasoning_content": reasoning}


def _family(template: str) -> str:
    marks = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "[INST]": "mistral", "<start_of_turn>": "gemma"}
    return next((name for mark, name in marks.items() if mark in template), "template")
