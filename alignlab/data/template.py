"""From a row to tokens and targets: the one place where text becomes token ids, for training and for sampling.

A rendered conversation is encoded as a whole, nothing added (the template writes its own BOS and EOS), and a token is
a target if it belongs to a stretch that the assistant has to write: spans make masks, never a comparison with a token
id.  Plain text gets what the tokenizer adds in front, and one end-of-sequence token.

What is rendered is said by :mod:`alignlab.data.turns`, the text and its stretches come from :mod:`alignlab.data.chat`,
tokens from :mod:`alignlab.data.span_tokens`, marks from :mod:`alignlab.data.masks`; what a row becomes is decided
here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignlab.data.chat import Chat, ControlToken, Path, Refused
from alignlab.data.examples import fault, prune
from alignlab.data.masks import roles_of, roles_of_plain, target_mask
from alignlab.data.span_tokens import SpanTokenizer
from alignlab.data.turns import clean, conversations
from alignlab.errors import ConfigError, DataError
from alignlab.types import EncodedSample, EncodedSequence, Message, Sample, Sequence

VERSION = 2
"""Part of every fingerprint: raise it when a change here, or in what this is made of, changes tokens or targets."""

_VERIFIED = 32
"""So many paths are decoded again and compared with the rendered text (a tokenizer whose offsets lie is refused)."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not trained on, and why: ``empty_response``, ``no_target``, ``identical_pair``, ``no_example``,
    ``overlong``, ``template_refused``, ``control_token``."""

    reason: str
    detail: str = ""


class Overlong(DataError):
    """A sequence is longer than ``data.max_length`` and ``data.overlong`` is ``error``."""


class Encoder:
    """Samples to token ids and target masks, with one tokenizer, template, longest length and set of policies.

    ``tokenizer`` must be a fast one (offsets), or None for rows that are tokens already.  ``chat_template``: a path or
    a template's text, default the tokenizer's.  ``max_length`` in tokens, None for no limit; ``overlong``: ``drop`` |
    ``cut`` (the end of the completion) | ``error``.  ``history_reasoning``: ``keep`` renders a conversation once for
    all its target turns; ``drop`` renders one path for each target turn, up to that turn, as the model would meet it
    (sequences of a pair are always one path, since a pair is of two).
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        max_length: int | None = None,
        overlong: str = "drop",
        history_reasoning: str = "keep",
    ) -> None:
        for name, value, known in (
            ("overlong", overlong, ("drop", "cut", "error")),
            ("history_reasoning", history_reasoning, ("keep", "drop")),
        ):
            if value not in known:
                raise ConfigError(f"data.{name} must be {' | '.join(known)}, not '{value}'")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"data.max_length must be at least 2, not {max_length}")
        self._text = SpanTokenizer(tokenizer) if tokenizer is not None else None
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.overlong = overlong
        self.history_reasoning = history_reasoning
        self.partial: Counter[str] = Counter()
        """sequences and pairs left out of rows that were kept, by reason; its reader clears it"""
        self._chat = Chat(tokenizer, chat_template) if tokenizer is not None else None
        spelled = sorted(tokenizer.all_special_tokens if tokenizer is not None else (), key=len, reverse=True)
        self.markup = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        """the special tokens as text: a response of nothing else says nothing"""
        self._to_verify = _VERIFIED
        self._stops: list[int] | None = None

    @property
    def template(self) -> str | None:
        """The template's text (what is saved with the model), None where there is none."""
        return self._chat.template if self._chat else None

    @property
    def template_name(self) -> str:
        """For people: a guess at the family and the head of the text's hash."""
        return self._chat.name if self._chat else "none"

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a completion: the tokenizer's EOS and the one the template puts behind an assistant turn."""
        if self._stops is None:
            self._stops = self._find_stops()
        return self._stops

    @property
    def policies(self) -> dict[str, Any]:
        """The settings beside tokenizer and template, as the constructor takes them."""
        return {name: getattr(self, name) for name in ("max_length", "overlong", "history_reasoning")}

    def go_on_for(self, template_name: str) -> None:
        """Do the work of another encoder, which has verified its first rows and names its template so."""
        self._to_verify = 0
        if self._chat is not None:
            self._chat.name = template_name

    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens and targets a sample becomes."""
        parts: list[Any] = [VERSION, self.max_length, self.overlong, self.history_reasoning, self.template]
        if self.tokenizer is not None:
            backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
            parts += [{k: v for k, v in backend.items() if k not in ("truncation", "padding")}]
            parts += [self.tokenizer.special_tokens_map, self.tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, sample: Sample) -> EncodedSample | Dropped:
        """The sample in tokens, without its faulty, overlong and (in tokens) identical parts; Dropped if none is left.

        Raises :class:`DataError` where the template or the tokenizer cannot serve, and under ``overlong=error``.
        """
        if reason := fault(sample, self.markup):
            return Dropped(reason)
        sample, reasons = prune(sample, self.markup)
        made: list[tuple[EncodedSequence, Sequence]] = []
        place: dict[int, int] = {}
        detail = ""
        for i, sequence in enumerate(sample.sequences):
            try:
                encoded = self._sequence(sequence, sample)
            except Refused as error:
                reasons[error.reason] += 1
                detail = str(error)
                continue
            for one in encoded:
                fitted = self._fitted(one, sample)
                if isinstance(fitted, Dropped):
                    reasons[fitted.reason] += 1
                    detail = fitted.detail
                else:
                    place[i] = len(made)
                    made.append((fitted, sequence))
        pairs = []
        for pair in sample.pairs:
            if pair.chosen not in place or pair.rejected not in place:
                continue
            moved = replace(pair, chosen=place[pair.chosen], rejected=place[pair.rejected])
            if _equal(made[moved.chosen][0], made[moved.rejected][0]):
                reasons["identical_pair"] += 1
            else:
                pairs.append(moved)
        if not made or (sample.pairs and not pairs):
            return Dropped(reasons.most_common(1)[0][0], detail)
        self.partial.update(reasons)
        return _encoded(sample, made, pairs)

    def foresee(self, samples: Iterable[Sample]) -> None:
        """Have the template rendered for all of ``samples`` at once, for :meth:`encode` to find; changes no result."""
        if self._chat is None:
            return
        found: list[tuple[list[Message], list[int], list[Any] | None]] = []
        for sample in samples:
            whole = self.history_reasoning == "keep" or bool(sample.pairs)
            for sequence in sample.sequences:
                if isinstance(sequence.prompt, list) or isinstance(sequence.completion, list):
                    with suppress(DataError, LookupError, TypeError, AttributeError):  # ``encode`` says what is wrong
                        found += [(*one, sample.tools) for one in conversations(sequence, whole)]
        self._chat.foresee(found)

    def render_prompt(self, messages: list[Message] | str, tools: list[Any] | None = None) -> list[int]:
        """Token ids of a prompt to answer: with the generation prompt, or plain text as the tokenizer begins it."""
        assert self._chat is not None, "a prompt needs a tokenizer"
        assert self._text is not None
        if isinstance(messages, str):
            return self._text.tokens(Path(messages, text_only=self._chat.special(messages)), special=True).ids
        try:
            return self._text.tokens(self._chat.prompt(clean(messages), tools)).ids
        except Refused as error:
            raise DataError(f"the chat template {self.template_name} refuses the prompt: {error}") from None

    def terminators(self, sequence: EncodedSequence) -> tuple[int, int]:
        """(target stretches, those that hold a terminator as a target); (0, 0) without a tokenizer."""
        if self.tokenizer is None:
            return 0, 0
        edges = np.flatnonzero(np.diff(sequence.target, prepend=False, append=False))
        ends = np.zeros(len(sequence.tokens), dtype=bool)
        for stop in self.stop_ids:
            ends |= sequence.tokens == stop
        return len(edges) // 2, sum(bool(ends[a:b].any()) for a, b in zip(edges[::2], edges[1::2], strict=True))

    # One sequence

    def _sequence(self, sequence: Sequence, sample: Sample) -> list[EncodedSequence]:
        if sequence.input_ids is not None:
            mask = sequence.target_mask
            if mask is None or len(mask) != len(sequence.input_ids):
                raise DataError(f"row {sample.id}: input_ids and target_mask differ in length")
            return [_made(sequence.input_ids, mask)]
        if self.tokenizer is None:
            raise DataError(f"row {sample.id}: the model has no tokenizer; give token rows (input_ids, prompt_length)")
        if isinstance(sequence.prompt, str) and isinstance(sequence.completion, str):
            return [self._plain(sequence.prompt, sequence.completion)]
        if isinstance(sequence.prompt, str) or isinstance(sequence.completion, str):
            raise DataError(f"row {sample.id}: prompt and completion must both be text or both be turns")
        whole = self.history_reasoning == "keep" or bool(sample.pairs)
        return [self._conversation(turns, targets, sample) for turns, targets in conversations(sequence, whole)]

    def _conversation(self, turns: list[Message], targets: list[int], sample: Sample) -> EncodedSequence:
        assert self._chat is not None
        assert self._text is not None
        try:
            path = self._chat.path(turns, targets, sample.tools)
        except DataError as error:
            raise DataError(f"row {sample.id}: {error}") from None
        encoding = self._text.tokens(path)
        mask = target_mask(encoding.spans, path.targets)
        if self._to_verify or path.text_only:
            self._to_verify = max(0, self._to_verify - 1)
            if misread := self._text.misread(path, encoding, mask):
                raise DataError(
                    f"row {sample.id}: the target tokens read {misread[0][:60]!r}, the template {self.template_name} "
                    f"wrote {misread[1][:60]!r}; this tokenizer cannot be masked by offsets"
                )
        words = self._chat.words(turns, sample.tools, path.text)
        return _made(encoding.ids, mask, roles_of(encoding.spans, mask, words))

    def _plain(self, prompt: str, completion: str) -> EncodedSequence:
        assert self._text is not None
        self._refuse_control(prompt, completion)
        encoding = self._text.tokens(Path(prompt + completion), special=True)
        ids, mask = encoding.ids, target_mask(encoding.spans, ((len(prompt), len(prompt) + len(completion)),))
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            return _made([*ids, end], [*mask, True])
        return _made(ids, [*mask[:-1], True])

    def _refuse_control(self, prompt: str, completion: str) -> None:
        """Plain text that spells a special token is either a conversation rendered elsewhere or an attack: not guessed.

        A completion may end with the end-of-sequence token, which stands there anyway.
        """
        assert self._chat is not None
        end = self.tokenizer.eos_token or ""
        text = prompt + (completion.removesuffix(end) if end else completion)
        for start, stop in self._chat.special(text)[:1]:
            raise ControlToken(f"plain text spells the control token {text[start:stop]}; write conversations as turns")

    def _fitted(self, one: EncodedSequence, sample: Sample) -> EncodedSequence | Dropped:
        most = self.max_length
        if most is not None and len(one.tokens) > most:
            said = f"{len(one.tokens)} tokens, longer than data.max_length {most}"
            if self.overlong == "error":
                raise Overlong(f"row {sample.id}: {said}; raise it, or set data.overlong to drop or cut")
            if self.overlong == "drop":
                return Dropped("overlong", said)
            one = EncodedSequence(one.tokens[:most], one.target[:most], None if one.roles is None else one.roles[:most])
        return one if one.target.any() else Dropped("no_target", "no target token is left")

    def _find_stops(self) -> list[int]:
        if self._chat is None or self._text is None:
            return []
        found = {self.tokenizer.eos_token_id} - {None}
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        if self.template:
            try:
                path = self._chat.path(turns, [1], None)
            except (Refused, DataError):
                return sorted(found)
            encoding = self._text.tokens(path)
            behind = path.text.rindex("y") + 1
            tail = [token for token, (start, _) in zip(encoding.ids, encoding.spans, strict=True) if start >= behind]
            found.update([token for token in tail if token in self._text.control][:1])
        return sorted(found)


def _made(ids: list[int], mask: list[bool], roles: np.ndarray | None = None) -> EncodedSequence:
    target = np.asarray(mask, dtype=bool)
    if roles is None:
        roles = roles_of_plain(target)
    target[:1] = False
    return EncodedSequence(np.asarray(ids, dtype=np.int32), target, roles)


def _equal(a: EncodedSequence, b: EncodedSequence) -> bool:
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.target, b.target)


def _encoded(sample: Sample, made: list[tuple[EncodedSequence, Sequence]], pairs: list[Any]) -> EncodedSample:
    def column(values: list[float | None]) -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)

    sources = [source for _, source in made]
    values = {"weight": column([s.weight for s in sources])}
    if any(s.label is not None for s in sources):
        values["label"] = column([None if s.label is None else float(s.label) for s in sources])
    for name in sorted({name for s in sources for name in s.scores}):
        values[f"score/{name}"] = column([s.scores.get(name) for s in sources])
    return EncodedSample(
        id=sample.id,
        source=sample.source,
        sequences=[encoded for encoded, _ in made],
        pairs=np.array([(p.chosen, p.rejected) for p in pairs], dtype=np.int32).reshape(-1, 2),
        sequence_values=values,
        pair_values={
            "weight": column([p.weight for p in pairs]),
            "margin": column([p.margin for p in pairs]),
            "absolute": column([float(p.absolute) for p in pairs]),
        },
        category=sample.category,
    )
