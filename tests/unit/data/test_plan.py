"""Step plans: which examples, which divisors, which micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data import bins as bins_module
from alignlab.data import trie
from alignlab.data.bins import Bin, Cost
from alignlab.data.index import Index, IndexWriter
from alignlab.data.pack import dense_mask, pack
from alignlab.data.plan import StepPlan, StepPlans, derangement, permutation, sequential
from alignlab.errors import ConfigError
from alignlab.types import EncodedSample, EncodedSequence, Unit

UNITS = [Unit.PAIR, Unit.SEQUENCE]


def computed(bins: list[Bin]) -> list[int]:
    """The examples of all bins but the fillers."""
    return sorted(number for one in bins if one.weight for item in one.items for number in item.examples)


def tokens_of(index: Index, one: Bin, layout: str, *, merge: bool = False, mixes: bool = False) -> int:
    return pack(index, one, layout, merge_prompts=merge, mixes_inputs=mixes, form="ragged").input_ids.numel()


def test_permutation_is_pinned() -> None:
    """If this changes, every run with the same seed sees its rows in another order."""
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 7, 2).tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]
    assert sorted(permutation(1000, -3, 5).tolist()) == list(range(1000))
    assert permutation(0, 0, 0).tolist() == []


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_example_once_an_epoch_in_the_same_steps(make_index: Callable[..., Index], unit: Unit, dp: int) -> None:
    index = make_index(30)
    shared = {"unit": unit, "global_batch_size": 7, "seed": 3, "epochs": 3}
    plain, plans = StepPlans(index, **shared), StepPlans(index, **shared, dp=dp, token_budget=40, layout="packed")
    count = index.example_count(unit)
    assert plans.total_steps == plain.total_steps == -(-3 * count // 7)
    stream = []
    for step in range(plans.total_steps):
        plan = plans.at(step)
        assert plan.examples.tolist() == plain.at(step).examples.tolist()
        assert plan.totals == plain.at(step).totals  # bit for bit
        assert len(plan.bins) % dp == 0
        assert len({len(plan.for_rank(rank)) for rank in range(dp)}) == 1
        assert sorted(map(id, chain(*(plan.for_rank(rank) for rank in range(dp))))) == sorted(map(id, plan.bins))
        assert computed(plan.bins) == sorted(plan.examples.tolist())
        stream += plan.examples.tolist()
    assert len(stream) == 3 * count
    epochs = [stream[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("unit", UNITS)
def test_samples_stay_together_in_the_stream(make_index: Callable[..., Index], unit: Unit) -> None:
    index = make_index(30)
    plans = StepPlans(index, unit=unit, global_batch_size=4, seed=0)
    samples = np.concatenate([plans.examples(step)[1] for step in range(plans.total_steps)])
    runs = samples[np.flatnonzero(np.diff(samples, prepend=-1))]
    assert len(runs) == len(set(runs.tolist()))


@pytest.mark.parametrize("unit", UNITS)
def test_totals_are_sums_over_examples(make_index: Callable[..., Index], unit: Unit) -> None:
    index = make_index(20)
    plans = StepPlans(index, unit=unit, global_batch_size=6, seed=1, dp=4, token_budget=30)
    for step in range(plans.total_steps):
        plan = plans.at(step)
        token = weight = 0.0
        for one in plan.bins:
            batch = pack(index, one, "tree")
            if not one.weight:
                continue
            counts = batch.seq_ptr.diff()
            if unit is Unit.PAIR:
                weight += batch.pair_values["weight"].double().sum().item()
                token += (batch.pair_values["weight"].double() * counts[batch.pairs[:, 0]]).sum().item()
            else:
                weight += batch.sequence_values["weight"].double().sum().item()
                token += (batch.sequence_values["weight"].double() * counts).sum().item()
        wanted = {Unit.TOKEN: token, Unit.SEQUENCE: weight, Unit.PAIR: weight if unit is Unit.PAIR else 0.0}
        assert plan.totals == pytest.approx(wanted, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10**6), st.sampled_from(["tree", "packed", "rows"]), st.sampled_from(UNITS), st.data())
def test_bins_keep_the_limits(make_index_once: Index, seed: int, layout: str, unit: Unit, data: st.DataObject) -> None:
    index = make_index_once
    budget = data.draw(st.one_of(st.none(), st.integers(5, 120)))
    most = data.draw(st.one_of(st.none(), st.integers(1, 6)))
    dp, merge, mixes = data.draw(st.sampled_from([1, 2, 3, 4])), data.draw(st.booleans()), data.draw(st.booleans())
    plans = StepPlans(
        index, unit=unit, global_batch_size=20, seed=seed, dp=dp, layout=layout, token_budget=budget,
        max_examples=most, merge_prompts=merge, mixes_inputs=mixes,
    )  # fmt: skip
    plan = plans.at(0)
    assert computed(plan.bins) == sorted(plan.examples.tolist())
    for one in plan.bins:
        assert one.tokens == tokens_of(index, one, layout, merge=merge, mixes=mixes)
        if len(one.items) == 1:
            continue  # an item larger than a limit is a bin of its own
        assert one.weight
        assert most is None or sum(len(item.examples) for item in one.items) <= most
        assert budget is None or one.tokens <= budget
    if budget is None and most is None:
        assert len(plan.bins) == dp
    assert (
        plan.bins == plans.at(0).bins == StepPlans(index, **plans.shared(), global_batch_size=20, seed=seed).at(0).bins
    )


@pytest.fixture(scope="module")
def make_index_once(tmp_path_factory: pytest.TempPathFactory) -> Index:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 5, 6) for _ in range(8)]
    with IndexWriter(tmp_path_factory.mktemp("plan") / "index") as writer:
        for number in range(40):
            prompt, sequences = prompts[number % 8], []
            for _ in range(1 + number % 4):
                completion = rng.integers(0, 3, rng.integers(1, 20))
                tokens = np.concatenate((prompt, completion)).astype(np.int32)
                sequences.append(EncodedSequence(tokens, np.arange(len(tokens)) >= len(prompt)))
            pairs = np.array([(0, n) for n in range(1, len(sequences))], np.int32).reshape(-1, 2)
            writer.add(EncodedSample(str(number), "", sequences, pairs, {}, {}))
        return writer.close()


def test_a_cut_tree_needs_only_its_own_sequences(tmp_path: Path) -> None:
    target = np.array([False, True])
    sequences = [EncodedSequence(np.array([1, n], np.int32), target) for n in range(4)]
    with IndexWriter(tmp_path / "index") as writer:
        pairs = np.array([[0, 1], [0, 2], [3, 2]], np.int32)
        writer.add(EncodedSample("a", "", sequences, pairs, {}, {}))
        index = writer.close()
    plans = StepPlans(index, unit=Unit.PAIR, global_batch_size=2, seed=0)
    first, second = plans.at(0), plans.at(1)
    assert [item.sequences for one in first.bins for item in one.items] == [(0, 1, 2)]
    assert [item.sequences for one in second.bins for item in one.items] == [(2, 3)]
    assert pack(index, second.bins[0], "tree").pairs.tolist() == [[1, 0]]
    assert second.totals[Unit.PAIR] == 1.0  # the last step is partial


def test_how_many_steps(make_index: Callable[..., Index]) -> None:
    index = make_index(10, most=1)

    def steps(**how: object) -> StepPlans:
        return StepPlans(index, unit=Unit.SEQUENCE, seed=0, **{"global_batch_size": 4, **how})  # type: ignore[arg-type]

    assert steps().total_steps == 3
    assert [len(steps().at(step).examples) for step in range(3)] == [4, 4, 2]
    assert steps(epochs=0.5).total_steps == 2
    assert sum(len(steps(epochs=0.5).at(step).examples) for step in range(2)) == 5
    assert steps(epochs=0.1, global_batch_size=1).total_steps == 1
    long = steps(max_steps=7, epochs=1)
    assert long.total_steps == 7
    assert [len(long.at(step).examples) for step in range(7)] == [4] * 7
    assert Counter(chain(*(long.at(step).examples.tolist() for step in range(5)))) == dict.fromkeys(range(10), 2)
    assert long.at(6).epoch == 2.8
    assert len(steps(global_batch_size=25, max_steps=1).at(0).examples) == 25  # more than an epoch in a step
    with pytest.raises(IndexError):
        long.at(7)


def test_a_sample_met_twice_in_a_row_is_two_items(make_index: Callable[..., Index]) -> None:
    index = make_index(1, least=3)
    plan = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=6, seed=0, max_steps=1).at(0)
    assert [item.sequences for one in plan.bins for item in one.items] == [(0, 1, 2)] * 2


def test_selections_are_planned_in_stored_numbers(make_index: Callable[..., Index]) -> None:
    index = make_index(12)
    chosen = index.select([3, 8, 3, 11])
    plan = StepPlans(chosen, unit=Unit.SEQUENCE, global_batch_size=100, seed=0).at(0)
    wanted = [n for row in (3, 8, 3, 11) for n in range(*index.sample_ptr[row : row + 2].tolist())]
    assert sorted(plan.examples.tolist()) == sorted(wanted)
    assert computed(plan.bins) == sorted(wanted)
    assert sequential(chosen, unit=Unit.SEQUENCE).examples.tolist() == wanted


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_sequential_is_everything_once_in_order(make_index: Callable[..., Index], dp: int, layout: str) -> None:
    index = make_index(25)
    plan = sequential(index, unit=Unit.SEQUENCE, dp=dp, layout=layout, token_budget=60)
    real = [one for one in plan.bins if one.weight]
    assert [n for one in real for item in one.items for n in item.examples] == list(range(index.num_sequences))
    assert len(plan.bins) % dp == 0
    assert all(len(one.items) == 1 or tokens_of(index, one, layout) <= 60 for one in real)
    assert len(sequential(index, unit=Unit.SEQUENCE).bins) == 1
    by_count = sequential(index, unit=Unit.PAIR, max_examples=1, dp=dp)
    assert all(len(one.items) == 1 for one in by_count.bins)


def test_many_items_are_cut_in_linear_time_and_keep_the_budget(
    make_index: Callable[..., Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bins_module, "MANY", 10)
    index = make_index(40)
    plan = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=1000, max_steps=1, seed=0, token_budget=90, dp=2).at(
        0
    )
    assert computed(plan.bins) == sorted(plan.examples.tolist())
    assert all(len(one.items) == 1 or tokens_of(index, one, "tree") <= 90 for one in plan.bins)


def test_ranks_get_even_loads(make_index: Callable[..., Index]) -> None:
    index = make_index(300, longest=80)
    plan = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=400, seed=0, dp=4, token_budget=600).at(0)
    loads = [sum(tokens_of(index, one, "tree") * one.weight for one in plan.for_rank(rank)) for rank in range(4)]
    assert max(loads) <= 1.03 * min(loads)
    needed = sum(tokens_of(index, one, "tree") * one.weight for one in plan.bins)
    assert len(plan.bins) <= 1.2 * needed / 600 + 4


# ---------------------------------------------------------------------------------------------------------------
# What a micro-batch costs, and how even the ranks are
# ---------------------------------------------------------------------------------------------------------------


def one_prompt(folder: Path, *samples: tuple[int, list[int]]) -> Index:
    """Samples of (tokens of the prompt, tokens of each answer) that share nothing but that prompt."""
    with IndexWriter(folder) as writer:
        for number, (prompt, answers) in enumerate(samples):
            sequences = [
                EncodedSequence(
                    np.concatenate((np.full(prompt, 9), np.full(answer, place))).astype(np.int32),
                    np.arange(prompt + answer) >= prompt,
                )
                for place, answer in enumerate(answers)
            ]
            writer.add(EncodedSample(str(number), "", sequences, np.zeros((0, 2), np.int32), {}, {}))
        return writer.close()


@pytest.mark.parametrize(("layout", "tokens", "cost"), [("tree", 7, 764), ("packed", 10, 1070), ("rows", 10, 1070)])
def test_the_cost_of_a_bin_is_tokens_visible_keys_and_scored_rows(
    tmp_path: Path, layout: str, tokens: int, cost: float
) -> None:
    """A prompt of 3 and two answers of 2; a token costs 100, a key 1, a scored row 10.

    Apart: 10 tokens, 2 x (1+2+3+4+5) = 30 keys, 4 scored rows: 1000 + 30 + 40.  As a tree the prompt's 3 tokens and
    1+2+3 keys are there once: 7 tokens and 24 keys: 700 + 24 + 40.
    """
    index = one_prompt(tmp_path / "index", (3, [2, 2]))
    plan = sequential(index, unit=Unit.SEQUENCE, layout=layout, cost=Cost(100, 1, 10))
    assert [(one.tokens, one.cost) for one in plan.bins] == [(tokens, cost)]


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_the_keys_are_those_that_attention_sees(tmp_path: Path, layout: str) -> None:
    index = one_prompt(tmp_path / "index", (5, [3, 7, 1]), (2, [9]), (6, [4, 4]))
    plan = sequential(index, unit=Unit.SEQUENCE, layout=layout, cost=Cost(0, 1, 0))
    batch = pack(index, plan.bins[0], layout)
    assert batch.plan is not None
    mask = dense_mask(batch.plan, batch.input_ids.numel())
    assert plan.bins[0].cost == mask.sum().item()


def test_long_rows_weigh_more_than_their_tokens(tmp_path: Path) -> None:
    """By tokens 101 and 99.  By keys the row of 81 has 81 x 82 / 2 = 3321, the others together 1820."""
    index = one_prompt(tmp_path / "index", (1, [80]), (1, [39]), (1, [38]), *[(1, [9])] * 4)

    def loads(cost: Cost) -> list[list[int]]:
        plan = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=7, seed=0, dp=2, cost=cost).at(0)
        return [sorted(int(index.lengths[i.sequences[0]]) for i in one.items) for one in plan.bins]

    assert loads(Cost(1, 0, 0)) == [[10, 10, 81], [10, 10, 39, 40]]
    assert loads(Cost(0, 1, 0)) == [[81], [10, 10, 10, 10, 39, 40]]


def test_fillers_and_uneven_ranks_are_counted(tmp_path: Path) -> None:
    """Rows of 10, 20 and 30 tokens on four ranks: one filler of 10, so 10 of 70 tokens train nothing.

    The dearest of the four costs 30, the mean is 17.5: the step takes 30 / 17.5 - 1 = 71% longer than if all were even.
    """
    index = one_prompt(tmp_path / "index", (4, [6]), (4, [16]), (4, [26]))
    plan = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=3, seed=0, dp=4, cost=Cost(1, 0, 0)).at(0)
    assert [(one.tokens, one.weight) for one in plan.bins] == [(30, 1.0), (20, 1.0), (10, 1.0), (10, 0.0)]
    assert plan.filler_share == pytest.approx(10 / 70)
    assert plan.imbalance == pytest.approx(30 / 17.5 - 1)
    alone = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=3, seed=0, token_budget=30).at(0)
    assert (len(alone.bins), alone.filler_share, alone.imbalance) == (2, 0.0, 0.0)  # one rank waits for nobody


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["tree", "packed"]), st.integers(1, 60))
def test_no_rank_has_much_more_than_its_share(
    make_index_once: Index, seed: int, dp: int, layout: str, size: int
) -> None:
    """Largest first to the least loaded comes within 4/3 of the best possible split (Graham, 1969), and that one is at
    least the mean and at least the largest item."""
    plans = StepPlans(
        make_index_once, unit=Unit.SEQUENCE, global_batch_size=size, seed=seed, dp=dp, layout=layout, cost=Cost(3, 1, 2)
    )
    plan = plans.at(0)
    assert len(plan.bins) == dp
    assert computed(plan.bins) == sorted(plan.examples.tolist())
    real = [one for one in plan.bins if one.weight]
    items = [item for one in real for item in one.items]
    costs = [bins_module._block(make_index_once, (item,), 0, plans.limits).cost for item in items]
    assert sum(one.cost for one in real) == pytest.approx(sum(costs))
    assert max(one.cost for one in plan.bins) <= 4 / 3 * max(sum(costs) / dp, *costs, 0) + 1e-6


def test_merged_prompts_share_a_bin(make_index_once: Index) -> None:
    shared = {"unit": Unit.SEQUENCE, "global_batch_size": 100, "seed": 0, "token_budget": 10**4, "dp": 2}
    plain = StepPlans(make_index_once, **shared).at(0)
    merged = StepPlans(make_index_once, **shared, merge_prompts=True).at(0)
    hashes = [{int(make_index_once.prompt_hash[item.sample]) for item in one.items} for one in merged.bins]
    assert not hashes[0] & hashes[1]
    assert merged.totals == plain.totals
    assert sum(tokens_of(make_index_once, one, "tree", merge=True) for one in merged.bins) < 0.9 * sum(
        tokens_of(make_index_once, one, "tree") for one in plain.bins
    )


@pytest.mark.parametrize(("budget", "bins"), [(36, 1), (35, 2)])
def test_merged_prompts_keep_the_budget_to_the_token(tmp_path: Path, budget: int, bins: int) -> None:
    """Three completions of ten tokens after one prompt of six: 36."""
    with IndexWriter(tmp_path / "index") as writer:
        for n in range(3):
            tokens = np.array([7] * 6 + [n] * 10, np.int32)
            sequence = EncodedSequence(tokens, np.arange(16) >= 6)
            writer.add(EncodedSample(str(n), "", [sequence], np.zeros((0, 2), np.int32), {}, {}))
        index = writer.close()
    plans = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=3, seed=0, token_budget=budget, merge_prompts=True)
    plan = plans.at(0)
    assert len(plan.bins) == bins
    assert all(tokens_of(index, one, "tree", merge=True) <= budget for one in plan.bins)


# ---------------------------------------------------------------------------------------------------------------
# Mismatched pairs
# ---------------------------------------------------------------------------------------------------------------


def test_partners_are_the_row_before() -> None:
    assert derangement(np.array([4, 8, 6]), np.array([0, 1, 2])).tolist() == [6, 4, 8]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_partners_are_never_oneself(samples: list[int]) -> None:
    numbers = np.sort(np.array(samples))
    examples = np.arange(len(numbers)) + 100
    found = derangement(examples, numbers)
    assert sorted(found.tolist()) == examples.tolist()
    assert (found != examples).all()
    of = dict(zip(examples.tolist(), numbers.tolist(), strict=True))
    possible = max(Counter(samples).values()) * 2 <= len(samples)
    siblings = any(of[a] == of[b] for a, b in zip(examples.tolist(), found.tolist(), strict=True))
    assert siblings != possible  # from another sample wherever a rotation can do it


def test_the_same_partners_at_any_world_size(make_index: Callable[..., Index]) -> None:
    index = make_index(20)
    seen = []
    for dp in (1, 2, 4):
        plans = StepPlans(
            index, unit=Unit.SEQUENCE, global_batch_size=6, seed=0, dp=dp, mismatched=True, max_steps=9, token_budget=60
        )
        steps: list[StepPlan] = [plans.at(step) for step in range(9)]
        for step, plan in enumerate(steps):
            pairs = plan.mismatched_pairs()
            assert pairs.tolist() == plans.mismatched_pairs(step).tolist()
            real = [item for one in plan.bins if one.weight for item in one.items]
            in_bins = [pair for item in real for pair in zip(item.sequences, item.partners or (), strict=True)]
            assert sorted(in_bins) == sorted(map(tuple, pairs.tolist()))
            for one in plan.bins:
                size = pack(index, one, "tree", select="mismatched").input_ids.numel()
                assert len(one.items) == 1 or size <= 60
        seen.append([plan.mismatched_pairs().tolist() for plan in steps])
    assert seen[0] == seen[1] == seen[2]
    with pytest.raises(ValueError, match="mismatched=True"):
        StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=6, seed=0).at(0).mismatched_pairs()


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (4, {"global_batch_size": 1, "mismatched": True}, "at least 2 examples in a step"),
        (1, {"global_batch_size": 4, "mismatched": True}, "at least 2 examples in a step"),
        (5, {"global_batch_size": 4, "mismatched": True}, "train.max_steps=1"),
        (4, {"global_batch_size": 0}, "train.global_batch_size: 0"),
        (4, {"token_budget": 0}, "train.token_budget: 0"),
        (4, {"max_examples": 0}, "train.per_device_train_batch_size: 0"),
        (4, {"layout": "bush"}, "model.layout: 'bush'"),
        (4, {"epochs": 0}, "no step to take"),
        (4, {"unit": Unit.PAIR}, "no pair to train on"),
    ],
)
def test_what_cannot_be_planned(make_index: Callable[..., Index], rows: int, how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepPlans(make_index(rows, most=1), **{"unit": Unit.SEQUENCE, "global_batch_size": 4, "seed": 0, **how})


def test_cost_of_a_tree_is_its_trie(make_index: Callable[..., Index]) -> None:
    """The budget is kept by exact sizes: what the plan thinks an item costs is what packing makes of it."""
    index = make_index(30, most=5)
    for mixes in (False, True):
        plan = StepPlans(index, unit=Unit.PAIR, global_batch_size=9, seed=2, mixes_inputs=mixes).at(1)
        for item in chain(*(one.items for one in plan.bins)):
            size = trie.size([index.sequence(number) for number in item.sequences], mixes)
            assert (
                bins_module._tree_tokens(index, (item,), mixes)
                == size
                == tokens_of(index, Bin((item,)), "tree", mixes=mixes)
            )
