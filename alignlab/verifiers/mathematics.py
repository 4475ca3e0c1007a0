"""Final answers compared as mathematics by math-verify (extra ``math``): fractions, roots, intervals, sets, LaTeX.

``number`` (:mod:`alignlab.verifiers.answers`) compares decimals and needs nothing installed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from alignlab.errors import ConfigError, DataError
from alignlab.verifiers.answers import expected

PATIENCE = 5
"""Seconds for reading, and for comparing, one answer; SymPy can take forever.  What takes longer is not equal."""
_MARK = re.compile(r"####\s*([^\n]+)")


def equal(verify: dict[str, Any], completion: str) -> dict[str, float]:
    """``correct``: the final answer equals ``verify["final_answer"]`` (or ``answer``); ``answered``: there is one.

    The final answer stands after the last ``####`` (GSM8K), else where math-verify finds it: the last ``\\boxed{}``,
    what follows "the answer is", else the last formula or number.  It equals what is wanted if SymPy says so, to six
    digits where one is a decimal.  Raises ConfigError without the package, DataError for a row without an answer.
    """
    library = _library()
    wanted = _wanted(expected(verify))
    found = library.parse(_final(completion), parsing_timeout=PATIENCE)
    correct = bool(found) and library.verify(list(wanted), found, timeout_seconds=PATIENCE)
    return {"correct": float(correct), "answered": float(bool(found))}


@lru_cache(maxsize=4096)
def _wanted(text: str) -> tuple[Any, ...]:
    """The wanted answer, read: all of the text after a ``####``, of a ``\\boxed{}``, or of the field."""
    answer = _final(text).strip().strip("$")
    boxed = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
    found = _library().parse(boxed, parsing_timeout=PATIENCE)
    if not found:
        raise DataError(f"verifier 'math': the row's answer {text!r} cannot be read")
    return tuple(found)


def _final(text: str) -> str:
    marked = _MARK.findall(text)
    return marked[-1] if marked else text


def _library() -> Any:
    try:
        import math_verify
    except ImportError:
        raise ConfigError("verifier 'math' needs math-verify: pip install 'alignlab[math]'") from None
    return math_verify
