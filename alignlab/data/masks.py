"""Which tokens are targets, and whose words each token is: from the stretches of text they stand for."""

from __future__ import annotations

from itertools import chain

import numpy as np

from alignlab.data.chat import Span

ROLES = ("system", "user", "assistant", "tool", "prompt", "completion", "template", "other")
"""Whose words a token is, for the ledger.  Of turns: the speaker's (a target is always the assistant's), or what the
template writes around them; ``other`` where the template does not show which.  ``prompt`` and ``completion`` are plain
text and rows of tokens."""
_CODES = {role: code for code, role in enumerate(ROLES)}


def target_mask(spans: list[Span], targets: tuple[Span, ...]) -> list[bool]:
    """Which tokens are targets: those that begin before a target's end, end behind its start, and not behind its end.

    A token across the start counts (else the first letter were lost), one across the end does not (it belongs to
    whoever speaks next).
    """
    mask, at = [], 0
    for start, end in spans:
        while at < len(targets) and start >= targets[at][1]:
            at += 1
        mask.append(at < len(targets) and end > targets[at][0] and end <= targets[at][1] and end > start)
    return mask


def roles_of(spans: list[Span], mask: list[bool], words: list[tuple[Span, str]] | None) -> np.ndarray:
    """uint8 [n], codes of ROLES: a target is the assistant's, another token the speaker's whose words it touches."""
    codes = np.full(len(spans), _CODES["other" if words is None else "template"], dtype=np.uint8)
    if words:
        bounds = np.fromiter(chain.from_iterable(spans), dtype=np.int64, count=2 * len(spans)).reshape(-1, 2)
        places = np.array([span for span, _ in words])
        speakers = np.array([_CODES.get(role, _CODES["other"]) for _, role in words], dtype=np.uint8)
        last = np.searchsorted(places[:, 0], bounds[:, 1], side="left") - 1
        inside = (last >= 0) & (bounds[:, 0] < places[last, 1])
        codes[inside] = speakers[last[inside]]
    codes[np.asarray(mask, dtype=bool)] = _CODES["assistant"]
    return codes


def roles_of_plain(target: np.ndarray) -> np.ndarray:
    """uint8 [n], codes of ROLES: what is no conversation is prompt, and completion where it is a target."""
    return np.where(target, _CODES["completion"], _CODES["prompt"]).astype(np.uint8)
