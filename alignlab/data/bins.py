"""A step's items cut into micro-batches: which tokens are computed together, and on which rank.

Nothing here changes a number; it changes memory and speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignlab.data import trie
from alignlab.data.index import Index
from alignlab.errors import ConfigError

LAYOUTS = ("tree", "packed", "rows")
ATTENTION_LENGTH = 8192
"""A sequence of this many tokens costs twice as much a token as a short one (only balances bins)."""
MANY = 10_000
"""Above so many items in one plan bins are filled one after the other in the order of size: linear time."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sample's share of a step: its examples there, and the sequences they need (stored numbers throughout)."""

    sample: int
    examples: tuple[int, ...]
    """pair numbers, or sequence numbers, by the plan's unit"""
    sequences: tuple[int, ...]
    pairs: tuple[int, ...]
    """pair numbers; empty when sequences are examples"""
    partners: tuple[int, ...] | None = None
    """KTO: for each of ``sequences`` the sequence whose completion it gets in the mismatched pass"""


@dataclass(frozen=True, slots=True)
class Bin:
    """One micro-batch.  ``weight`` is 0 for a filler, which repeats a small item to keep the ranks in step."""

    items: tuple[Item, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How a step is cut into micro-batches; nothing here changes which examples it holds."""

    token_budget: int | None = None
    """tokens in a micro-batch (padding included in the layout ``rows``)"""
    max_examples: int | None = None
    dp: int = 1
    layout: str = "tree"
    mixes_inputs: bool = False
    merge_prompts: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"model.layout: '{self.layout}' is none of {', '.join(LAYOUTS)}")
        for key, value in (("token_budget", self.token_budget), ("per_device_train_batch_size", self.max_examples)):
            if value is not None and value < 1:
                raise ConfigError(f"train.{key}: {value} is not a positive number")
        if self.dp < 1:
            raise ConfigError(f"the number of ranks is {self.dp}")


@dataclass(frozen=True, slots=True)
class _Block:
    """Items that go into one bin together (one item, unless prompts are merged), and their size."""

    items: tuple[Item, ...]
    place: int
    """of the first in the step: breaks ties"""
    tokens: int
    examples: int
    sequences: int
    longest: int
    cost: float


def cut(index: Index, items: Sequence[Item], limits: Limits, *, in_order: bool = False) -> list[Bin]:
    """Items -> bins, a multiple of ``limits.dp``; ``in_order``: filled one after the other, else balanced.

    An item larger than the limits is a bin of its own.
    """
    blocks = [_block(index, (item,), place, limits) for place, item in enumerate(items)]
    smallest = min(blocks, key=lambda block: (block.cost, block.place), default=None)
    if smallest is None:
        return []
    if limits.merge_prompts and limits.layout == "tree":
        blocks = _merged(index, blocks, limits)
    groups = _consecutive(blocks, limits) if in_order else _balanced(blocks, limits)
    bins = [
        Bin(tuple(item for block in sorted(group, key=lambda b: b.place) for item in block.items)) for group in groups
    ]
    missing = -len(bins) % limits.dp
    return bins + [Bin(smallest.items, 0.0)] * missing


def _block(index: Index, items: tuple[Item, ...], place: int, limits: Limits, tokens: int | None = None) -> _Block:
    """The size of these items in the layout; a mismatched pass over them must fit as well, so the larger counts."""
    sequences = np.array([number for item in items for number in item.sequences])
    lengths = index.lengths[sequences].astype(np.int64)
    if tokens is None:
        if limits.layout == "tree":
            tokens = _tree_tokens(index, items[0], limits.mixes_inputs)
        else:
            tokens = int(lengths.sum())
    if items[0].partners is not None:
        others = np.array([number for item in items for number in item.partners or ()])
        prompts = index.prompt_lengths[sequences].astype(np.int64)
        lengths = np.maximum(lengths, prompts + index.lengths[others] - index.prompt_lengths[others])
        tokens = max(tokens, int(lengths.sum()))
    longest = int(lengths.max())
    return _Block(
        items=items,
        place=place,
        tokens=tokens,
        examples=sum(len(item.examples) for item in items),
        sequences=len(sequences),
        longest=longest,
        cost=tokens * (1 + longest / ATTENTION_LENGTH),
    )


def _tree_tokens(index: Index, item: Item, mixes_inputs: bool) -> int:
    if len(item.sequences) == 1:
        return int(index.lengths[item.sequences[0]])
    if len(item.sequences) == index.sample_ptr[item.sample + 1] - index.sample_ptr[item.sample]:
        return int(index.tree_tokens(mixes_inputs)[item.sample])
    return trie.size([index.sequence(number) for number in item.sequences], mixes_inputs)


def _merged(index: Index, blocks: list[_Block], limits: Limits) -> list[_Block]:
    """Blocks of equal prompts joined as long as the limits hold; each joins for its tokens less the prompt's."""
    joined: list[_Block] = []
    open_block: dict[int, int] = {}
    for block in blocks:
        item = block.items[0]
        first = int(index.sample_ptr[item.sample])
        # Only an item that holds its sample's first sequence is sure to hold the hashed prompt.
        prompt = int(index.prompt_lengths[first]) if first in item.sequences else 0
        hashed = int(index.prompt_hash[item.sample])
        if hashed in open_block and prompt:
            old = joined[open_block[hashed]]
            tokens = old.tokens + block.tokens - (prompt if item.partners is None else 0)
            if _fits(tokens, old.examples + block.examples, limits):
                joined[open_block[hashed]] = _block(index, old.items + block.items, old.place, limits, tokens)
                continue
        if prompt:
            open_block[hashed] = len(joined)
        joined.append(block)
    return joined


def _fits(tokens: int, examples: int, limits: Limits) -> bool:
    return (limits.token_budget is None or tokens <= limits.token_budget) and (
        limits.max_examples is None or examples <= limits.max_examples
    )


class _Filling:
    """Bins being filled: their loads as arrays, so that one comparison asks all of them."""

    def __init__(self, limits: Limits, bins: int, growing: bool = False) -> None:
        self.limits, self.growing = limits, growing
        self.groups: list[list[_Block]] = [[] for _ in range(bins)]
        self.load = np.zeros((4, bins), dtype=np.float64)  # tokens, examples, sequences, longest

    def fits(self, block: _Block) -> np.ndarray:
        """bool [bins]: where the block may go; any block may go into an empty bin."""
        tokens, examples, sequences, longest = self.load
        if self.limits.layout == "rows":
            after = (sequences + block.sequences) * np.maximum(longest, block.longest)
        else:
            after = tokens + block.tokens
        budget = math.inf if self.limits.token_budget is None else self.limits.token_budget
        most = math.inf if self.limits.max_examples is None else self.limits.max_examples
        return ((after <= budget) & (examples + block.examples <= most)) | (sequences == 0)

    def put(self, place: int, block: _Block) -> None:
        if self.growing and place == len(self.groups) - 1:  # there is always an empty one at the end
            self.groups.append([])
            self.load = np.pad(self.load, ((0, 0), (0, 1)))
        self.groups[place].append(block)
        self.load[:3, place] += (block.tokens, block.examples, block.sequences)
        self.load[3, place] = max(self.load[3, place], block.longest)


def _by_size(blocks: Sequence[_Block], limits: Limits) -> list[_Block]:
    if limits.layout == "rows":
        return sorted(blocks, key=lambda block: (-block.longest, block.place))
    return sorted(blocks, key=lambda block: (-block.cost, block.place))


def _balanced(blocks: list[_Block], limits: Limits) -> list[list[_Block]]:
    """As few bins as the limits allow, a multiple of dp where there are items enough, evened out.

    First fit, largest first, finds how many bins it takes; then every block goes, largest first, to the bin with the
    least cost that has room.  Bins come out so that those of one round cost about the same (ranks wait for each other)
    and every other round is dealt backwards (no rank gets the larger one each time).
    """
    ordered = _by_size(blocks, limits)
    if len(ordered) > MANY:
        groups = _consecutive(ordered, limits)
    else:
        first_fit = _Filling(limits, 1, growing=True)
        for block in ordered:
            first_fit.put(int(first_fit.fits(block).argmax()), block)
        groups = _evened(ordered, first_fit.groups[:-1], limits)

    groups.sort(key=lambda group: (-sum(block.cost for block in group), min(block.place for block in group)))
    full = len(groups) // limits.dp
    for turn in range(1, full, 2):
        groups[turn * limits.dp : (turn + 1) * limits.dp] = groups[turn * limits.dp : (turn + 1) * limits.dp][::-1]
    return groups


def _consecutive(blocks: list[_Block], limits: Limits) -> list[list[_Block]]:
    """Bins filled one after the other, in order."""
    groups: list[list[_Block]] = []
    filling = _Filling(limits, 1)
    for block in blocks:
        if groups and not filling.fits(block)[0]:
            filling = _Filling(limits, 1)
        if not filling.groups[0]:
            groups.append(filling.groups[0])
        filling.put(0, block)
    return groups


def _evened(ordered: list[_Block], groups: list[list[_Block]], limits: Limits) -> list[list[_Block]]:
    """Every block, largest first, to the bin with the least cost that has room; ``groups`` where that gets stuck."""
    wanted = min(math.ceil(len(groups) / limits.dp) * limits.dp, len(ordered))
    if limits.layout == "rows" and wanted == len(groups):
        return groups  # first fit keeps equal lengths together: less padding than evening out would leave
    even, costs = _Filling(limits, wanted), np.zeros(wanted)
    for block in ordered:
        room = even.fits(block)
        if not room.any():
            break
        place = int(np.where(room, costs, np.inf).argmin())
        even.put(place, block)
        costs[place] += block.cost
    else:
        return even.groups
    return groups
