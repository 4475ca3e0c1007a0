"""From answers to requests, and from replies to figures: one class a kind of template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from alignlab.judges.endpoint import Messages
from alignlab.judges.figures import Compared, difference, rankings, ratings, win_rate
from alignlab.judges.sides import Side
from alignlab.judges.templates import Ranking, Template
from alignlab.rewards.intervals import Draws


class Panel(Protocol):
    """One way of judging the sides' answers to ``prompts`` (texts that every side answered)."""

    template: Template
    sides: list[Side]
    requests: list[Messages]

    def figures(self, replies: Sequence[str], draws: Draws) -> dict[str, Any]:
        """The figures of the replies to ``requests``, in their order."""
        ...

    def verdicts(self, replies: Sequence[str]) -> list[dict[str, Any]]:
        """What was read for each prompt, for a file; None where a reply was no verdict."""
        ...


def make_panel(template: Template, sides: list[Side], prompts: list[str], seed: int) -> Panel:
    """The panel of the template's kind."""
    kinds: dict[str, Any] = {"pair": Pairs, "score": Scores, "ranking": Rankings}
    panel: Panel = kinds[template.kind](template, sides, prompts, seed)
    return panel


@dataclass
class _Asked:
    """What every kind of panel is made of, and what it asks."""

    template: Template
    sides: list[Side]
    prompts: list[str]
    seed: int
    requests: list[Messages] = field(init=False)


@dataclass
class Pairs(_Asked):
    """Two sides, each prompt in both orders; answers that are the same text are a tie without a question."""

    def __post_init__(self) -> None:
        self.requests = []
        for prompt, first, second in self._rows():
            if first != second:
                self.requests += [self.template.messages(prompt, pair) for pair in ((first, second), (second, first))]

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(p, self.sides[0].answers[p], self.sides[1].answers[p]) for p in self.prompts]

    def _compared(self, replies: Sequence[str]) -> list[Compared]:
        left = iter(replies)
        found = []
        for _, first, second in self._rows():
            sizes = (len(first), len(second))
            if first == second:
                found.append(Compared(0.5, 0.5, sizes, asked=False))
                continue
            forward, swapped = (self.template.read(next(left), 2) for _ in range(2))
            assert not isinstance(forward, Ranking)
            assert not isinstance(swapped, Ranking)
            found.append(Compared(forward, None if swapped is None else 1 - swapped, sizes))
        return found

    def figures(self, replies: Sequence[str], draws: Draws) -> dict[str, Any]:
        return win_rate(self._compared(replies), draws)

    def verdicts(self, replies: Sequence[str]) -> list[dict[str, Any]]:
        found = zip(self.prompts, self._compared(replies), strict=True)
        return [{"prompt": p, "forward": one.forward, "swapped": one.swapped} for p, one in found]


@dataclass
class Scores(_Asked):
    """Every side's answers rated one by one."""

    def __post_init__(self) -> None:
        self.requests = [self.template.messages(p, [side.answers[p]]) for side in self.sides for p in self.prompts]

    def _scores(self, replies: Sequence[str]) -> dict[str, list[float | None]]:
        read = [self.template.read(reply, 1) for reply in replies]
        count = len(self.prompts)
        scores = [None if score is None or isinstance(score, Ranking) else score for score in read]
        return {side.name: scores[i * count : (i + 1) * count] for i, side in enumerate(self.sides)}

    def figures(self, replies: Sequence[str], draws: Draws) -> dict[str, Any]:
        scores = self._scores(replies)
        first, *others = self.sides
        sizes = {side.name: [len(side.answers[p]) for p in self.prompts] for side in self.sides}
        return {
            "sides": {name: ratings(scores[name], sizes[name], draws) for name in scores},
            "differences": {side.name: difference(scores[first.name], scores[side.name], draws) for side in others},
        }

    def verdicts(self, replies: Sequence[str]) -> list[dict[str, Any]]:
        scores = self._scores(replies)
        return [{"prompt": p, **{name: scores[name][i] for name in scores}} for i, p in enumerate(self.prompts)]


@dataclass
class Rankings(_Asked):
    """All sides' answers to a prompt at once, in an order drawn for the prompt and in the reverse of it."""

    def __post_init__(self) -> None:
        self.requests = []
        for prompt in self.prompts:
            answers = [side.answers[prompt] for side in self.sides]
            self.requests += [
                self.template.messages(prompt, [answers[side] for side in order]) for order in self._orders(prompt)
            ]

    def _orders(self, prompt: str) -> tuple[list[int], list[int]]:
        order = list(range(len(self.sides)))
        Random(f"{self.seed}/{prompt}").shuffle(order)
        return order, order[::-1]

    def _read(self, replies: Sequence[str]) -> list[tuple[Ranking | None, Ranking | None]]:
        found = []
        for number, prompt in enumerate(self.prompts):
            pair = replies[2 * number : 2 * number + 2]
            read = [self._by_side(text, order) for text, order in zip(pair, self._orders(prompt), strict=True)]
            found.append((read[0], read[1]))
        return found

    def _by_side(self, reply: str, order: list[int]) -> Ranking | None:
        read = self.template.read(reply, len(order))
        if not isinstance(read, Ranking):
            return None
        places = [order.index(side) for side in range(len(order))]
        return Ranking(tuple(read.scores[i] for i in places), tuple(read.ranks[i] for i in places))

    def figures(self, replies: Sequence[str], draws: Draws) -> dict[str, Any]:
        sizes = [[len(side.answers[p]) for side in self.sides] for p in self.prompts]
        return rankings(self._read(replies), sizes, [side.name for side in self.sides], draws)

    def verdicts(self, replies: Sequence[str]) -> list[dict[str, Any]]:
        found = zip(self.prompts, self._read(replies), strict=True)
        return [{"prompt": p, "orders": [one and vars(one) for one in pair]} for p, pair in found]
