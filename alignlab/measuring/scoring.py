"""A reward model over rows: loaded, its layout proved, every answer scored, the rows found again.

Used by ``evaluate rm=``, and through :mod:`alignlab.measuring.scorers` wherever generated texts are scored.  One
process; the prompt that answers share is computed once where the layout allows it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from alignlab import dist
from alignlab.config import RootConfig
from alignlab.data import trie
from alignlab.data.index import Index, IndexWriter
from alignlab.data.ledger import read_samples
from alignlab.data.loader import Loader
from alignlab.data.pack import batch_of, plain_form, to_device
from alignlab.data.plan import sequential
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.sources import Needs, holds_out
from alignlab.data.template import Dropped
from alignlab.engine.base import cast_parameters
from alignlab.errors import DataError, NumericsError
from alignlab.models.load import disable_dropout, load_model, resolve_dtype
from alignlab.models.proof import choose_layout
from alignlab.models.scorer import Scorer
from alignlab.models.source import check_reward_model
from alignlab.models.tokens import check_token_ids
from alignlab.rewards.judged import Judged, judge
from alignlab.runfolder import RunFolder, finished_model
from alignlab.runs.job import TOKEN_BUDGET, make_encoder
from alignlab.train.rewards import sequence_rewards
from alignlab.types import Ask, EncodedSample, EncodedSequence, Sample, Unit

PAIRS = Needs(Unit.PAIR, world_kind="trees")


@dataclass(frozen=True)
class Alone:
    """Some answers scored once more, each alone, unpadded, with the model's own attention: the same within rounding?

    ``largest`` is the largest change of a reward, ``relative`` the same in standard deviations of the rewards, ``row``
    the row it was seen in.
    """

    sequences: int
    largest: float
    relative: float
    row: str


@dataclass(frozen=True)
class Scored:
    """One model's rewards of the rows, and what was done to get them."""

    model: str
    judged: Judged
    prepared: Prepared
    template: str
    layout: str
    layout_line: str
    dtype: str
    parameters: int
    ends_in_pad: int
    """rows whose last token is the model's pad token: transformers' own pooling reads another one there"""
    alone: Alone | None


class RewardModel:
    """The reward model that ``config.model`` names, ready to score; ConfigError where it is none."""

    def __init__(self, config: RootConfig) -> None:
        check_reward_model(config.model)
        self.config = config
        self.tokenizer, self.encoder = make_encoder(config.model, config.data)
        dist.init(timeout=config.engine.timeout)
        self.device = dist.device()
        self.dtype = resolve_dtype(config.model.dtype, self.device)
        self.loaded = load_model(config.model, "scalar", self.dtype, config.seed)
        disable_dropout(self.loaded.model)
        self.layout, self.layout_line = choose_layout(
            self.loaded.model, config.model.layout, form=plain_form(self.device)
        )
        self.scorer = Scorer(self.loaded.model, "scalar", self.layout)
        cast_parameters(self.scorer, self.dtype)
        self.scorer.to(self.device).eval()

    def rewards(self, prepared: Prepared) -> np.ndarray:
        """float64 [stored sequences], NaN outside the selection; NumericsError names rows with a reward not finite."""
        index, counted = prepared.index, prepared.manifest
        check_token_ids(self.loaded.model, counted["largest_token"], counted["largest_at"], self.loaded.name)
        found = self._forward(index)
        numbers = _sequences(index)
        wrong = numbers[~np.isfinite(found[numbers])]
        if len(wrong):
            raise _not_finite(len(wrong), _named(prepared, wrong))
        return found

    def of(self, samples: Sequence[Sample]) -> list[list[float | None]]:
        """The reward of every sequence of every sample, for texts that stand in no file.

        None where a sequence cannot be read: it says nothing, is too long, or spells a control token.  Equal sequences
        of a sample are computed once.  NumericsError names a sample with a reward that is not finite.
        """
        self.encoder.foresee(samples)
        rewards: list[list[float | None]] = [[None] * len(sample.sequences) for sample in samples]
        stored: list[tuple[int, list[int]]] = []
        with TemporaryDirectory() as folder, IndexWriter(Path(folder) / "index") as writer:
            for number, sample in enumerate(samples):
                encoded = self._encoded(sample)
                if encoded:
                    stored += [(number, places) for _, places in encoded]
                    writer.add(_as_stored(sample, [sequence for sequence, _ in encoded]))
            if not stored:
                return rewards
            index = writer.close()
            for (number, places), reward in zip(stored, self._forward(index).tolist(), strict=True):
                if not math.isfinite(reward):
                    raise _not_finite(1, samples[number].id)
                for place in places:
                    rewards[number][place] = reward
        return rewards

    def _encoded(self, sample: Sample) -> list[tuple[EncodedSequence, list[int]]]:
        """The distinct sequences of ``sample`` that can be read, each with its places."""
        found: dict[bytes, tuple[EncodedSequence, list[int]]] = {}
        for place, sequence in enumerate(sample.sequences):
            one = self.encoder.encode(replace(sample, sequences=[sequence], pairs=[]))
            if not isinstance(one, Dropped):
                encoded = one.sequences[-1]
                found.setdefault(encoded.tokens.tobytes(), (encoded, []))[1].append(place)
        return list(found.values())

    def _forward(self, index: Index) -> np.ndarray:
        loader = Loader(
            index, self.layout, self.device, torch.float64 if self.dtype == torch.float64 else torch.float32, 0,
            pad_id=(self.tokenizer.pad_token_id if self.tokenizer is not None else None) or 0,
        )  # fmt: skip
        train = self.config.train
        plan = sequential(
            index, unit=Unit.SEQUENCE, layout=self.layout, max_examples=train.per_device_train_batch_size,
            token_budget=train.token_budget or TOKEN_BUDGET[self.device.type],
        )  # fmt: skip
        self.scorer.layout = self.layout
        return sequence_rewards(self.scorer, loader, plan, index.num_sequences, self.device)

    def alone(self, index: Index, rewards: np.ndarray, count: int) -> Alone | None:
        """``count`` answers, spread evenly over the index, scored one by one; None where ``count`` is 0."""
        if not count:
            return None
        everyone = _sequences(index)
        numbers = everyone[np.unique(np.linspace(0, len(everyone) - 1, min(count, len(everyone))).astype(np.int64))]
        self.scorer.layout = "rows"
        changes = []
        with torch.no_grad():
            for number in numbers.tolist():
                batch = to_device(batch_of([index.sequence(number)], "rows"), self.device)
                changes.append(abs(self.scorer(batch, Ask("reward")).rewards.item() - rewards[number]))
        self.scorer.layout = self.layout
        worst = int(np.argmax(changes))
        spread = float(np.std(rewards[everyone]))
        return Alone(
            len(numbers), changes[worst], changes[worst] / spread if spread else 0.0,
            index.sample_id(_sample_of(index, int(numbers[worst]))),
        )  # fmt: skip


def _not_finite(count: int, where: str) -> NumericsError:
    return NumericsError(
        f"the reward of {count} answer(s) is not finite: {where}. Look at the rows and at the model's weights, or take "
        "model.dtype=fp32"
    )


def _as_stored(sample: Sample, sequences: list[EncodedSequence]) -> EncodedSample:
    weight = {"weight": np.ones(len(sequences), dtype=np.float32)}
    nothing = np.zeros((0, 2), dtype=np.int32)
    return EncodedSample(
        sample.id, sample.source, sequences, nothing, weight, {"weight": np.zeros(0, dtype=np.float32)}
    )


def score(config: RootConfig, *, alone: int = 0) -> Scored:
    """The rewards of the rows of ``config.data`` (the held-out ones where it names some) by ``config.model``."""
    model = RewardModel(config)
    held_out = holds_out(config.data)
    prepared = prepare(config.data, PAIRS, model.encoder, held_out=held_out, seed=config.seed)
    if config.eval.limit is not None:
        index = prepared.index
        prepared = replace(prepared, index=index.select(range(min(config.eval.limit, len(index)))))
    index = prepared.index
    rewards = model.rewards(prepared)
    judged = judge(index, rewards, config.data.rating)
    pad = model.loaded.model.config.pad_token_id
    ends = index.tokens[index.seq_ptr[_sequences(index) + 1] - 1]
    return Scored(
        model=config.model.name_or_path,
        judged=judged,
        prepared=prepared,
        template=model.encoder.template_name,
        layout=model.layout,
        layout_line=model.layout_line,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.loaded.model.parameters()),
        ends_in_pad=0 if pad is None else int((ends == pad).sum()),
        alone=model.alone(index, rewards, alone),
    )


def reward_model(name: str) -> tuple[str, RunFolder | None]:
    """(what to load, the run it comes from) for a run, its ``model`` folder, another folder or a hub name."""
    return finished_model(name, "rm")


# ---------------------------------------------------------------------------------------------------------------
# The same pairs of two models
# ---------------------------------------------------------------------------------------------------------------


def same_pairs(one: Scored, other: Scored) -> tuple[Judged, Judged, int]:
    """(``one`` and ``other`` with the pairs that both have, in one order; how many rows are left out).

    Two tokenizers may make different rows too long.  A row counts only if neither model lost it or a part of it.
    """
    (first, seen), (second, too) = _whole_rows(one), _whole_rows(other)
    both = [key for key in first if key in second]
    if not both:
        raise DataError("the two models share no row: each of them lost what the other kept (data/rejected.jsonl)")
    mine = one.judged.only(np.concatenate([first[key] for key in both]))
    theirs = other.judged.only(np.concatenate([second[key] for key in both]))
    return mine, theirs, len(seen | too) - len(both)


_Key = tuple[str, int, int]
"""file, line, and which copy of the row (a weighted source holds several)"""


def _whole_rows(scored: Scored) -> tuple[dict[_Key, np.ndarray], set[_Key]]:
    """(the pairs, as places in ``judged.pairs``, of every row of which no part was lost; the keys of all rows)."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, sample in enumerate(scored.judged.samples.tolist()):
        places[sample].append(place)
    rows = {key: number for number, key in _places(scored.prepared).items() if number in places}
    lost = _lost(scored.prepared)
    return {key: np.array(places[number]) for key, number in rows.items() if key[:2] not in lost}, set(rows)


def _places(prepared: Prepared) -> dict[int, _Key]:
    """Where each sample of the index stands, by stored number."""
    copies: Counter[tuple[str, int]] = Counter()
    found = {}
    for number, file, line in _columns(prepared, "number", "file", "line"):
        if number is not None:
            found[number] = (file, line, copies[file, line])
            copies[file, line] += 1
    return found


def _lost(prepared: Prepared) -> set[tuple[str, int]]:
    """The rows that were kept without some of their parts."""
    return {(file, line) for file, line, lost in _columns(prepared, "file", "line", "lost") if lost}


def _columns(prepared: Prepared, *names: str) -> Iterator[tuple[Any, ...]]:
    table = read_samples(prepared.folder)
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _sequences(index: Index) -> np.ndarray:
    """Stored numbers of the sequences of the index's selection."""
    return trie.ranges(index.sample_ptr[index.rows], index.sample_ptr[index.rows + 1])


def _sample_of(index: Index, sequence: int) -> int:
    return int(np.searchsorted(index.sample_ptr, sequence, side="right") - 1)


def _named(prepared: Prepared, sequences: np.ndarray, shown: int = 4) -> str:
    """Rows of sequences, by file, line and id."""
    samples = sorted({_sample_of(prepared.index, number) for number in sequences.tolist()})
    places = _places(prepared)
    named = [f"{places[n][0]}: line {places[n][1]} ({prepared.index.sample_id(n)})" for n in samples[:shown]]
    return ", ".join(named) + (f" and {len(samples) - shown} more rows" if len(samples) > shown else "")
