"""Equal prompts of different rows: merged inside a step, or brought together over the whole epoch."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.config import DataConfig
from alignlab.data import cache, trie
from alignlab.data.index import Index
from alignlab.data.ledger import SampleWriter, StepLedger
from alignlab.data.ledger_query import Ledger
from alignlab.data.loader import Loader
from alignlab.data.pack import pack
from alignlab.data.plan import StepPlan, StepPlans, permutation, sequential
from alignlab.data.prepare import prepare
from alignlab.data.random_trees import VOCABULARY, write_index
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.equivalence.precision import whole_float64
from alignlab.metrics import Meter
from alignlab.models import tiny
from alignlab.models.scorer import Scorer
from alignlab.registry import OBJECTIVES
from alignlab.testing import Result, distance, run_step, tiny_model
from alignlab.types import EncodedSample, EncodedSequence, StepContext, Unit

PROMPTS, ANSWERS = 12, 4
PROMPT, ANSWER = 30, 10
"""Tokens of each."""


def answered(prompt: np.ndarray, answers: list[np.ndarray], pairs: list[tuple[int, int]], name: str) -> EncodedSample:
    made = [np.concatenate((prompt, answer)).astype(np.int32) for answer in answers]
    return EncodedSample(
        id=name,
        source="",
        sequences=[EncodedSequence(tokens, np.arange(len(tokens)) >= len(prompt)) for tokens in made],
        pairs=np.array(pairs, dtype=np.int32).reshape(-1, 2),
        sequence_values={"label": np.arange(len(answers)) % 2 == 0},
        pair_values={},
    )


def text(rng: np.random.Generator, first: int, length: int) -> np.ndarray:
    """Tokens of which the first is given, so that two texts differ where they begin."""
    return np.concatenate(([first], rng.integers(1, VOCABULARY, length - 1)))


@pytest.fixture(scope="module")
def prompts() -> list[tuple[np.ndarray, list[np.ndarray]]]:
    rng = np.random.default_rng(3)
    return [
        (text(rng, 1 + number, PROMPT), [text(rng, 1 + place, ANSWER) for place in range(ANSWERS)])
        for number in range(PROMPTS)
    ]


@pytest.fixture(scope="module")
def flat(prompts: list[tuple[np.ndarray, list[np.ndarray]]], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A row an answer, the answers of a prompt far from each other."""
    rows = [
        answered(prompt, [answers[place]], [], f"{number}-{place}")
        for place in range(ANSWERS)
        for number, (prompt, answers) in enumerate(prompts)
    ]
    return write_index(tmp_path_factory.mktemp("flat") / "index", rows)


@pytest.fixture(scope="module")
def pairs(prompts: list[tuple[np.ndarray, list[np.ndarray]]], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """A row a pair, as preference files have it: each answer stands in three rows."""
    rows = [
        answered(prompt, [answers[a], answers[b]], [(0, 1)], f"{number}-{a}{b}")
        for a in range(ANSWERS)
        for b in range(a + 1, ANSWERS)
        for number, (prompt, answers) in enumerate(prompts)
    ]
    return write_index(tmp_path_factory.mktemp("pairs") / "index", rows)


def plans(index: Index, unit: Unit, merge: str, **settings: object) -> StepPlans:
    return StepPlans(
        index, unit=unit, merge_prompts=merge != "false", group_prompts=merge == "global",
        **{"global_batch_size": 8, "seed": 5, **settings},  # type: ignore[arg-type]
    )  # fmt: skip


def computed(index: Index, plan: StepPlan, merge: str) -> int:
    """Tokens in the step's micro-batches."""
    batches = [pack(index, one, "tree", merge_prompts=merge != "false") for one in plan.bins]
    assert [batch.input_ids.numel() for batch in batches] == [one.tokens for one in plan.bins]
    return sum(one.tokens for one in plan.bins)


def test_an_epoch_holds_every_example_once_and_a_prompts_examples_together(flat: Index) -> None:
    plan = plans(flat, Unit.SEQUENCE, "global", epochs=2)
    whole = [plan.examples(step)[1] for step in range(plan.total_steps)]
    stream = np.concatenate(whole)
    epochs = stream.reshape(2, -1)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(PROMPTS * ANSWERS))
        hashes = flat.prompt_hash[epoch].reshape(PROMPTS, ANSWERS)
        assert (hashes == hashes[:, :1]).all()
        assert (np.diff(epoch.reshape(PROMPTS, ANSWERS)) > 0).all()  # in stored order
    assert (flat.prompt_hash[epochs[0]] != flat.prompt_hash[epochs[1]]).any()
    other = plans(flat, Unit.SEQUENCE, "global", seed=6)
    assert (np.concatenate([other.examples(step)[1] for step in range(other.total_steps)]) != epochs[0]).any()


def test_the_order_of_prompts_is_pinned(flat: Index) -> None:
    """If this changes, every run with data.merge_prompts=global and the same seed sees its rows in another order."""
    plan = plans(flat, Unit.SEQUENCE, "global")
    firsts = [int(plan.examples(step)[1][place]) for step in range(plan.total_steps) for place in (0, 4)]
    assert firsts == permutation(PROMPTS, 5, 0).tolist()  # prompt n is first met in row n


def test_without_the_key_the_order_is_the_rows_own(flat: Index) -> None:
    for merge in ("false", "true"):
        plan = plans(flat, Unit.SEQUENCE, merge)
        stream = np.concatenate([plan.examples(step)[1] for step in range(plan.total_steps)])
        assert stream.tolist() == permutation(PROMPTS * ANSWERS, 5, 0).tolist()


def test_selections_are_grouped_in_stored_numbers(flat: Index) -> None:
    chosen = flat.select([40, 4, 16, 3, 4])
    samples = plans(chosen, Unit.SEQUENCE, "global").examples(0)[1]
    assert sorted(samples.tolist()) == [3, 4, 4, 16, 40]
    own = [sample for sample in samples.tolist() if sample % PROMPTS == 4]
    assert own == [40, 4, 16, 4]  # of one prompt, in the selection's order
    places = np.flatnonzero(samples % PROMPTS == 4)
    assert (np.diff(places) == 1).all()


def test_one_token_is_no_prompt(tmp_path: Path) -> None:
    """Texts that begin alike are not one prompt: the first token of a text is never a target."""
    rng = np.random.default_rng(0)
    rows = [answered(np.array([7]), [rng.integers(1, VOCABULARY, 9)], [], str(number)) for number in range(40)]
    index = write_index(tmp_path / "index", rows)
    assert len(set(index.prompt_hash.tolist())) == 1
    plan = plans(index, Unit.SEQUENCE, "global", token_budget=100)
    order = np.concatenate([plan.examples(step)[1] for step in range(plan.total_steps)])
    assert order.tolist() == permutation(40, 5, 0).tolist()
    assert all(one.tokens == 10 * len(one.items) for one in plan.at(0).bins)  # nothing was merged


@pytest.mark.parametrize(("merge", "tokens"), [("false", 1920), ("global", 840)])
def test_how_much_less_is_computed_for_scored_completions(flat: Index, merge: str, tokens: int) -> None:
    """Four answers of 10 tokens to a prompt of 30: 4 x 40 = 160 apart, 30 + 4 x 10 = 70 together, 12 prompts."""
    plan = plans(flat, Unit.SEQUENCE, merge)
    assert sum(computed(flat, plan.at(step), merge) for step in range(plan.total_steps)) == tokens


@pytest.mark.parametrize(("merge", "tokens"), [("false", 3600), ("global", 840)])
def test_pairs_of_one_prompt_share_their_answers_too(pairs: Index, merge: str, tokens: int) -> None:
    """Six pairs of four answers: 6 x (30 + 20) = 300 apart, one tree of 30 + 40 = 70 together."""
    plan = plans(pairs, Unit.PAIR, merge, global_batch_size=12, token_budget=140)
    found = [plan.at(step) for step in range(plan.total_steps)]
    assert sum(computed(pairs, one, merge) for one in found) == tokens
    if merge == "global":  # exact sizes: two trees of 70 tokens fit, where one of 30 + 6 x 20 would not
        assert [len(one.bins) for one in found] == [1] * 6


def test_a_prompt_cut_by_a_step_is_computed_in_both(flat: Index) -> None:
    plan = plans(flat, Unit.SEQUENCE, "global", global_batch_size=6)
    steps = [plan.at(step) for step in range(plan.total_steps)]
    assert [computed(flat, one, "global") for one in steps] == [70 + 30 + 20, 30 + 20 + 70] * 4
    assert Counter(n for one in steps for n in one.examples.tolist()) == dict.fromkeys(range(48), 1)


def test_a_mismatched_partner_answers_another_prompt(flat: Index) -> None:
    """Rotated by one, three of four neighbours would get another answer to their own prompt, which matches it."""
    plan = plans(flat, Unit.SEQUENCE, "global", mismatched=True)
    for step in range(plan.total_steps):
        own, partner = plan.mismatched_pairs(step).T
        assert (flat.prompt_hash[own] != flat.prompt_hash[partner]).all()
        assert plan.at(step).mismatched_pairs().tolist() == plan.mismatched_pairs(step).tolist()
        assert sorted(partner.tolist()) == sorted(own.tolist())


def whole(index: Index, name: str, merge: str, head: str, layout: str = "tree") -> Result:
    """Loss and gradient of one step that holds the whole epoch, in float64."""
    objective = OBJECTIVES.get(name)(OBJECTIVES.get(name).Config())
    plan = plans(
        index, objective.example, merge, global_batch_size=index.example_count(objective.example), token_budget=300,
        mixes_inputs=objective.mixes_inputs, layout=layout,
    ).at(0)  # fmt: skip
    loader = Loader(
        index, layout, torch.device("cpu"), torch.float64, 0, mixes_inputs=objective.mixes_inputs,
        merge_prompts=merge != "false",
    )  # fmt: skip
    model = tiny_model(head, 1)
    context = StepContext(step=1, total_steps=10, warmup_steps=4, seed=0, totals=plan.totals)
    scorer = Scorer(model, head, layout)
    with whole_float64("fp64"):  # transformers' norms round to float32
        loss = run_step(scorer, objective, loader, plan, context, Meter())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return Result(loss.item(), gradients, {})


@pytest.mark.parametrize("name", ["sft", "ift", "dpo", "reward"])
def test_the_loss_and_the_gradient_of_a_set_of_rows_do_not_change(flat: Index, pairs: Index, name: str) -> None:
    index = flat if name in ("sft", "ift") else pairs
    rng = np.random.default_rng(0)
    index.attach("reference", -30 + rng.random(index.num_sequences).astype(np.float32))
    head = "scalar" if name == "reward" else "lm"
    apart, inside, together = (whole(index, name, merge, head) for merge in ("false", "true", "global"))
    assert apart.loss != 0
    assert distance(inside, apart) < 1e-9
    assert distance(together, apart) < 1e-9
    totals = [plans(index, OBJECTIVES.get(name).example, merge).at(0).totals for merge in ("false", "true")]
    assert totals[0] == totals[1]


def test_the_ledger_names_the_rows_that_each_step_held(pairs: Index, tmp_path: Path) -> None:
    plan = plans(pairs, Unit.PAIR, "global", global_batch_size=9, epochs=2)
    account = tmp_path / "samples.parquet"
    with SampleWriter(account, Unit.PAIR) as writer:
        for number in range(len(pairs)):
            writer.kept(number + 1, {"file": "rows.jsonl", "line": number + 1}, [pairs.sample(number)], {})
    ledger = StepLedger(tmp_path / "ledger", account, pairs, Unit.PAIR, 0)
    for step in range(plan.total_steps):
        ledger.record(plan.at(step), skipped=False)
    ledger.flush()
    found = Ledger(tmp_path / "ledger")
    assert found.times_seen.tolist() == [2.0] * len(pairs)
    for step in range(plan.total_steps):
        named = [sample["id"] for sample in found.step(step + 1)["samples"]]
        assert named == [pairs.sample_id(int(sample)) for sample in plan.examples(step)[1]]
        prompts = [name.partition("-")[0] for name in named]
        begun = [prompts[0], *(b for a, b in pairwise(prompts) if a != b)]
        assert len(begun) == len(set(begun))  # no prompt comes back inside a step


# ---------------------------------------------------------------------------------------------------------------
# Rows that are trees as they come
# ---------------------------------------------------------------------------------------------------------------


def prefixes(index: Index) -> int:
    """The tokens of one tree of all sequences, counted naively: their different beginnings."""
    found = (index.sequence(number).tokens.tolist() for number in range(index.num_sequences))
    return len({tuple(tokens[: end + 1]) for tokens in found for end in range(len(tokens))})


def prepared(row: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return prepare(DataConfig(path=str(folder / "rows.jsonl")), Needs(Unit.PAIR), Encoder(tiny.tokenizer())).index


def test_four_scored_completions_are_one_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["It is twelve.", "It is ten.", "Twelve, I think.", "No."]
    row = {"instruction": "What is seven and five? " * 4}
    row["completions"] = [{"response": answer, "overall_score": 5 - n} for n, answer in enumerate(answers)]
    index = prepared(row, tmp_path, monkeypatch)
    assert (len(index), index.num_sequences, len(index.pairs)) == (1, 4, 6)
    bins = sequential(index, unit=Unit.PAIR).bins
    batch = pack(index, bins[0], "tree")
    assert len(bins) == 1
    assert batch.input_ids.shape == (1, prefixes(index))
    assert batch.input_ids.numel() < 0.5 * int(index.lengths.sum())


def test_a_tree_of_five_turns_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UltraInteract's shape: at each turn a right and a wrong action, the wrong one goes on with what it led to."""
    wrong: list[dict[str, Any]] = []
    trajectories = []
    for turn in range(5):
        for correct in (True, False):
            said = {"role": "assistant", "content": f"{'so' if correct else 'perhaps'} {turn}", "correct": correct}
            trajectories.append({"success": correct, "turns": [*wrong, said]})
        wrong += [said, {"role": "user", "content": f"Observation: {turn} is wrong"}]
    index = prepared({"prompt": "Add them up.", "trajectories": trajectories}, tmp_path, monkeypatch)
    assert (len(index), index.num_sequences, len(index.pairs)) == (1, 10, 5)
    batch = pack(index, sequential(index, unit=Unit.PAIR).bins[0], "tree")
    assert batch.input_ids.shape == (1, prefixes(index))
    tree = trie.build([index.sequence(number) for number in range(10)], False)
    assert np.diff(tree.path_ptr).max() >= 5  # nodes on the longest path
    spelled = ["".join(map(str, tree.tokens[tree.path(number)])) for number in range(10)]
    assert spelled == ["".join(map(str, index.sequence(number).tokens)) for number in range(10)]


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_deep_tree_trains_as_its_rows_do(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    context, sequences = text(rng, 1, 6), []
    for _ in range(5):
        sequences += [(context, text(rng, 2, 4)), (context, text(rng, 3, 5))]
        context = np.concatenate((context, sequences[-1][1], text(rng, 4, 3)))
    index = write_index(
        tmp_path / "index",
        [
            EncodedSample(
                id="deep",
                source="",
                sequences=[
                    EncodedSequence(
                        np.concatenate((before, answer)).astype(np.int32),
                        np.arange(len(before) + len(answer)) >= len(before),
                    )
                    for before, answer in sequences
                ],
                pairs=np.arange(10, dtype=np.int32).reshape(-1, 2),
                sequence_values={},
                pair_values={"margin": np.full(5, 0.5), "absolute": np.ones(5)},
            )
        ],
    )
    index.attach("reference", -20 + rng.random(10).astype(np.float32))
    head = "scalar" if name == "reward" else "lm"
    rows, tree = (whole(index, name, "false", head, layout) for layout in ("rows", "tree"))
    assert rows.loss != 0
    assert distance(tree, rows) < 1e-9
