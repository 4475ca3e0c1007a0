"""Text to token ids that know which stretch of the text they stand for.

Text that spells a control token without being one (in a turn's content) stays text.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from alignlab.data.chat import Path, Refused, Span
from alignlab.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids with the [start, end) of the text each stands for; the intervals cover the text without gaps."""

    ids: list[int]
    spans: list[Span]


class SpanTokenizer:
    """A tokenizer that says where its tokens stand; DataError for a slow one, which cannot."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer is a slow one and cannot say where tokens stand; use its fast version")
        self._tokenizer = tokenizer
        self.control = frozenset(tokenizer.added_tokens_decoder)
        """the ids of its added tokens, special or not"""

    def tokens(self, path: Path, *, special: bool = False) -> Encoding:
        """``path`` encoded; what its ``text_only`` stretches spell is text, whatever it spells.

        Control tokens cut a text before anything else looks at it, so the stretch between two real ones can be encoded
        again on its own without changing its neighbours.
        """
        encoding = self._encode(path.text, special=special)
        if not path.text_only or not self._forged(encoding, path.text_only):
            return encoding
        ids: list[int] = []
        spans: list[Span] = []
        first = 0
        for i in range(len(encoding.ids) + 1):
            last = i == len(encoding.ids)
            if not last and (encoding.ids[i] not in self.control or _touches(encoding.spans[i], path.text_only)):
                continue
            if first < i:
                start, end = encoding.spans[first][0], encoding.spans[i - 1][1]
                inner = [(a - start, b - start) for a, b in path.text_only if start <= a and b <= end]
                part = Encoding(encoding.ids[first:i], [(a - start, b - start) for a, b in encoding.spans[first:i]])
                part = self._as_text(path.text[start:end], inner) if inner else part
                ids += part.ids
                spans += [(a + start, b + start) for a, b in part.spans]
            if not last:
                ids.append(encoding.ids[i])
                spans.append(encoding.spans[i])
            first = i + 1
        return Encoding(ids, spans)

    def misread(self, path: Path, encoding: Encoding, mask: list[bool]) -> tuple[str, str] | None:
        """What the first run of targets that does not decode to its text decodes to, and that text; None if all do."""
        for start, end in path.targets:
            run = [i for i, span in enumerate(encoding.spans) if mask[i] and _touches(span, ((start, end),))]
            ids = [encoding.ids[i] for i in run]
            if self._tokenizer.unk_token_id in ids:
                continue
            written = path.text[encoding.spans[run[0]][0] : encoding.spans[run[-1]][1]] if run else ""
            decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if not run or _plainly(decoded) != _plainly(written):
                return decoded, written
        return None

    def _as_text(self, text: str, inner: list[Span]) -> Encoding:
        encoding = self._encode(text, split=True)
        if not self._forged(encoding, inner):
            return encoding
        # Added tokens that are not special stay whole even so: cut each behind its first character.
        cuts = [0, *(start + 1 for start, _ in inner), len(text)]
        parts = [(cut, self._encode(text[cut:end], split=True)) for cut, end in pairwise(cuts)]
        encoding = Encoding(
            [token for _, part in parts for token in part.ids],
            [(a + cut, b + cut) for cut, part in parts for a, b in part.spans],
        )
        if self._forged(encoding, inner):
            raise Refused("content spells a control token that this tokenizer cannot write as text")
        return encoding

    def _forged(self, encoding: Encoding, text_only: tuple[Span, ...] | list[Span]) -> bool:
        return any(
            token in self.control and _touches(span, text_only)
            for token, span in zip(encoding.ids, encoding.spans, strict=True)
        )

    def _encode(self, text: str, *, special: bool = False, split: bool = False) -> Encoding:
        encoded = self._tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=split,
            truncation=False,
            verbose=False,
        )
        spans, last = [], 0
        for start, end in encoded["offset_mapping"]:
            # Some tokenizers trim the space in front of a word out of its offsets: a gap belongs to the token behind.
            start = min(start, last)
            spans.append((start, max(start, end)))
            last = max(last, end)
        return Encoding(list(encoded["input_ids"]), spans)


def _touches(span: Span, others: tuple[Span, ...] | list[Span]) -> bool:
    return any(span[0] < end and span[1] > start for start, end in others)


def _plainly(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
