"""The maps, gymnasium's tables of them, and the two policies that the tables give: the optimal one and the random one.

A state is a cell, numbered row by row.  The ice is not slippery, so a move is the cell that it leads to, and a policy
is a matrix: ``matrix[s, t]`` is the probability of being in cell t one move after cell s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alignlab.errors import ConfigError

MAPS: dict[str, tuple[str, ...]] = {
    "detour": ("SFFF", "FHHF", "FHHG", "FFFF"),
    "trap": ("SFFF", "FHHF", "FHHG", "FHHH"),
}
"""S start, F ice, H hole, G gift.  Each has one optimal and one sub-optimal trajectory (:func:`trajectories`)."""

DISCOUNT = 0.9
"""Of value iteration.  On a map whose only reward is the gift, any value below 1 gives the same optimal moves."""

Tables = list[list[list[tuple[int, float]]]]
"""state -> action -> [(next state, reward)], one of them where the ice is not slippery"""


def environment(rows: Sequence[str]) -> Any:
    """gymnasium's FrozenLake on the map ``rows``, not slippery."""
    try:
        import gymnasium
    except ImportError:
        raise ConfigError("the frozen lake needs gymnasium: pip install 'alignlab[frozen_lake]'") from None
    return gymnasium.make("FrozenLake-v1", desc=list(rows), is_slippery=False)


class Lake:
    """One map: who can move where, and what that is worth."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = tuple(rows)
        self.letters = "".join(rows)
        self.cells = len(self.letters)
        self.start = self.letters.index("S")
        self.acting = np.array([letter in "SF" for letter in self.letters])
        """[cells]: where the agent moves; in a hole and at the gift the episode is over"""
        table = environment(rows).unwrapped.P
        actions = range(len(table[0]))
        self.next = np.array([[table[cell][action][0][1] for action in actions] for cell in range(self.cells)])
        """[cells, actions]: where an action leads; against the border the agent stays, and so it does at the end"""
        self.reward = np.array([[table[cell][action][0][2] for action in actions] for cell in range(self.cells)])

    def values(self) -> np.ndarray:
        """[cells]: discounted return of the best policy, by value iteration."""
        value = np.zeros(self.cells)
        while True:
            better = np.where(self.acting, self.returns(value).max(1), 0.0)
            if np.abs(better - value).max() < 1e-12:
                return better
            value = better

    def returns(self, value: np.ndarray) -> np.ndarray:
        """[cells, actions]: reward and discounted ``value`` of where each action leads."""
        return self.reward + DISCOUNT * value[self.next]

    def matrix(self, policy: np.ndarray) -> np.ndarray:
        """[cells, cells] of a ``policy`` [cells, actions]: T[s, t] sums pi(a | s) over the actions that lead to t."""
        found = np.zeros((self.cells, self.cells))
        for action in range(policy.shape[1]):
            np.add.at(found, (np.arange(self.cells), self.next[:, action]), policy[:, action])
        return found

    def optimal(self) -> np.ndarray:
        """The optimal policy's matrix; cells with several best moves take each of them equally often."""
        returns = self.returns(self.values())
        best = np.isclose(returns, returns.max(1, keepdims=True), atol=1e-9)
        return self.matrix(best / best.sum(1, keepdims=True))

    def random(self) -> np.ndarray:
        """The matrix of the agent that takes every action equally often."""
        return self.matrix(np.full(self.next.shape, 1 / self.next.shape[1]))

    def trajectories(self) -> list[list[int]]:
        """The map's trajectories, the shortest to the gift first: from the start, never into a cell twice, never into
        a hole while another way is left, up to the gift or a hole."""
        return sorted(self._onward([self.start]), key=lambda path: (self.letters[path[-1]] != "G", len(path)))

    def _onward(self, path: list[int]) -> Iterator[list[int]]:
        if not self.acting[path[-1]]:
            yield path
            return
        new = sorted(set(self.next[path[-1]].tolist()) - set(path))
        for cell in [cell for cell in new if self.letters[cell] != "H"] or new:
            yield from self._onward([*path, cell])
