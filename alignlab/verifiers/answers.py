"""Verifiers for answers that can be read off the end of a text: a number, or the letter of a choice."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from alignlab.errors import DataError

_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-−]?\.\d+")
_MARKED_NUMBER = re.compile(r"####\s*([^\n]*)|\\boxed\{([^{}]*)\}")
# The letter itself must be upper case (an article "a" is no choice); the words before it may not be.
_MARKED_CHOICE = re.compile(
    r"(?i:answer|choice|option|choose)(?i:\s+is)?\s*[:=]?\s*(?:\*\*|\\boxed\{)?\s*\(?([A-Z])\)?(?![A-Za-z'’])"
)
_LONE_CHOICE = re.compile(r"^\s*(?:\*\*)?\(?([A-Z])(?:[).:]|\*\*|\s*$)", re.MULTILINE)


def number(verify: dict[str, Any], completion: str) -> dict[str, float]:
    """``correct``: the final number equals ``verify["final_answer"]`` (or ``answer``); ``answered``: there is one.

    The final number stands after the last ``####`` or in the last ``\\boxed{}`` (GSM8K, MATH); without either it is
    the last number of the text.  Thousands separators and trailing zeros do not matter.
    """
    wanted = _last_number(expected(verify))
    if wanted is None:
        raise DataError(f"verifier 'number': the row's answer {expected(verify)!r} holds no number")
    found = _last_number(completion)
    return {"correct": float(found == wanted), "answered": float(found is not None)}


def choice(verify: dict[str, Any], completion: str) -> dict[str, float]:
    """``correct``: the chosen letter equals ``verify["answer_idx"]`` (or ``final_answer``, ``answer``).

    The letter is the last one that follows "answer", "option" or "choice"; else the first that stands alone at the
    start of a line, as in ``B``, ``(B)`` or ``B. text``.  ``answered``: there is one.
    """
    wanted = expected(verify, "answer_idx").strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", wanted):
        raise DataError(f"verifier 'choice': the row's answer {wanted!r} is not one letter")
    found = final_choice(completion)
    return {"correct": float(found == wanted), "answered": float(found is not None)}


def final_number(completion: str) -> str | None:
    """The number that :func:`number` reads, in one spelling for equal values; None where there is none."""
    found = _last_number(completion)
    return None if found is None else f"{found.normalize():f}"


def final_choice(completion: str) -> str | None:
    """The letter that :func:`choice` reads; None where there is none."""
    marked = _MARKED_CHOICE.findall(completion)
    return marked[-1] if marked else next(iter(_LONE_CHOICE.findall(completion)), None)


def expected(verify: dict[str, Any], *first: str) -> str:
    """The row's answer, under the first of ``first``, ``final_answer`` and ``answer`` that is there; else DataError."""
    for key in (*first, "final_answer", "answer"):
        if verify.get(key) is not None:
            return str(verify[key])
    raise DataError(f"the verifier needs one of {', '.join((*first, 'final_answer', 'answer'))} in the row")


def _last_number(text: str) -> Decimal | None:
    marked = _MARKED_NUMBER.findall(text)
    found = _NUMBER.findall("".join(marked[-1]) if marked else text)
    try:
        return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None
    except InvalidOperation:
        return None
