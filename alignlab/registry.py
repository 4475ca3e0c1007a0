"""Names and what they stand for: objectives, row formats, verifiers, readers of final answers.

Built-in entries are import paths, so that listing names imports nothing.  A plug-in registers the thing itself with a
decorator; an installed package may use the entry-point groups ``alignlab.objectives``, ``alignlab.formats`` and
``alignlab.verifiers``.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from alignlab.errors import ConfigError

T = TypeVar("T")


class Registry:
    """``name -> entry`` for one kind of thing; unknown names are answered with the nearest known one."""

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._paths = dict(builtin)
        self._entries: dict[str, Any] = {}

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._paths, *self._entries, *(e.name for e in self._installed())})

    def is_builtin(self, name: str) -> bool:
        """Whether ``name`` comes with the library."""
        return name in self._paths

    def get(self, name: str) -> Any:
        """The entry called ``name``; a :class:`ConfigError` with the nearest names where there is none."""
        if name in self._entries:
            return self._entries[name]
        if name in self._paths:
            module, _, attribute = self._paths[name].partition(":")
            entry = getattr(import_module(module), attribute)
        else:
            found = [e for e in self._installed() if e.name == name]
            if not found:
                raise ConfigError(unknown_name(self.kind, name, self.names()))
            entry = found[0].load()
        self._entries[name] = entry
        return entry

    def add(self, name: str, entry: Any) -> None:
        """Register ``entry``; a name can be taken once (the same object again is no error)."""
        if name in self._paths or (name in self._entries and self._entries[name] is not entry):
            raise ConfigError(f"{self.kind} '{name}' is registered already; choose another name")
        self._entries[name] = entry

    def _installed(self) -> list[Any]:
        return list(entry_points(group=f"alignlab.{self.kind}s"))


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """One line for a name nobody knows: the nearest ones first, then all."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"unknown {kind} '{name}'{hint} Known: {', '.join(known)}"


OBJECTIVES = Registry(
    "objective",
    {
        "sft": "alignlab.objectives.sft:SFT",
        "dpo": "alignlab.objectives.dpo:DPO",
        "kto": "alignlab.objectives.kto:KTO",
        "ift": "alignlab.objectives.ift:IFT",
        "cpsft": "alignlab.objectives.cpo:CPSFT",
        "cpo": "alignlab.objectives.cpo:CPO",
        "reward": "alignlab.objectives.reward:Reward",
    },
)
FORMATS = Registry(
    "format",
    {
        "messages": "alignlab.data.formats:from_messages",
        "prompt_completion": "alignlab.data.formats:from_prompt_completion",
        "text": "alignlab.data.formats:from_text",
        "alpaca": "alignlab.data.formats:from_alpaca",
        "questions": "alignlab.data.formats:from_questions",
        "prompts": "alignlab.data.formats:from_prompts",
        "preference": "alignlab.data.formats:from_preference",
        "rewardbench": "alignlab.data.formats_rewardbench:from_rewardbench",
        "hh": "alignlab.data.formats:from_hh",
        "unpaired": "alignlab.data.formats:from_unpaired",
        "scored": "alignlab.data.formats:from_scored",
        "sampled": "alignlab.data.formats_sampled:from_sampled",
        "tokens": "alignlab.data.formats:from_tokens",
        "trees": "alignlab.data.formats_trees:from_trees",
        "ultrainteract_trees": "alignlab.data.formats_trees:from_ultrainteract_trees",
        "ultrainteract_augmented": "alignlab.data.formats_trees:from_ultrainteract_augmented",
        "ultrafeedback": "alignlab.data.formats_sources:from_ultrafeedback",
        "helpsteer": "alignlab.data.formats_sources:from_helpsteer",
    },
)
VERIFIERS = Registry(
    "verifier",
    {
        "sums": "alignlab.data.world:measure",
        "number": "alignlab.verifiers.answers:number",
        "choice": "alignlab.verifiers.answers:choice",
        "math": "alignlab.verifiers.mathematics:equal",
    },
)
FINAL_ANSWERS = Registry(
    "final_answer",
    {
        "sums": "alignlab.data.world:final_answer",
        "number": "alignlab.verifiers.answers:final_number",
        "choice": "alignlab.verifiers.answers:final_choice",
    },
)
"""By verifier: what a text says in the end, for a majority vote."""


def register_objective(what: Any) -> Any:
    """Class decorator, ``@register_objective`` or ``@register_objective("name")``, for an objective with a ``Config``.

    Bare, the class is known under its own ``name``.
    """
    return _registering(OBJECTIVES, what)


def register_format(what: Any) -> Any:
    """Decorator, bare or with a name, for ``row: dict -> Sample``; chosen with ``data.format=<name>``.

    Bare, the function is known under its own name.
    """
    return _registering(FORMATS, what)


def register_verifier(what: Any) -> Any:
    """Decorator, bare or with a name, for ``(verify: dict, completion: str) -> dict[str, float]``: measures of a text.

    Bare, the function is known under its own name.
    """
    return _registering(VERIFIERS, what)


def register_final_answer(what: Any) -> Any:
    """Decorator, bare or with a name, for ``(completion: str) -> str | None``: what a text says in the end.

    Texts with equal answers vote together.  The name is the verifier's whose rows it reads.
    """
    return _registering(FINAL_ANSWERS, what)


def _registering(registry: Registry, what: Any) -> Any:
    if not isinstance(what, str):
        registry.add(getattr(what, "name", None) or what.__name__, what)
        return what

    def add(entry: T) -> T:
        if isinstance(entry, type):
            entry.name = what  # type: ignore[attr-defined]
        registry.add(what, entry)
        return entry

    return add
