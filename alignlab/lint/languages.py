"""Which language a row is in, by py3langid (extra ``languages``): a model of 4.6 MB that comes with the package.

Short texts, sums and code have no language that could be told; they are counted as undecided, never guessed.
"""

from __future__ import annotations

from typing import Any

UNDECIDED = "undecided"
CERTAIN = 0.6
"""Least probability that counts."""
CHARACTERS = 400
"""Of a text that are looked at: enough to tell, and the model's time grows with them (0.3 ms for these)."""


def available() -> bool:
    """Whether the library that tells languages is installed."""
    try:
        import py3langid  # noqa: F401
    except ImportError:
        return False
    return True


class Languages:
    """Tells languages by their ISO 639-1 code."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._model: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def of(self, text: str) -> str:
        """The code of the language that ``text`` begins in, or ``undecided``."""
        code, probability = self._model.classify(text[:CHARACTERS])
        return str(code) if probability >= CERTAIN and code != "zxx" else UNDECIDED  # zxx: no language at all
