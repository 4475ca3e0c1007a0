"""The ledger: its sums are the index's, a step is recorded once whatever dies when, and streams compare by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from alignlab.config import DataConfig, SourceConfig
from alignlab.data import cache
from alignlab.data.index import Index
from alignlab.data.ledger import (
    SAMPLES_FILE,
    STEPS,
    STEPS_NAME,
    SampleWriter,
    StepLedger,
    content_hash,
    read_samples,
    read_steps,
    step_hash,
)
from alignlab.data.ledger_query import Ledger, parting
from alignlab.data.masks import ROLES
from alignlab.data.plan import StepPlans
from alignlab.data.prepare import Prepared, prepare
from alignlab.data.segments import Segments
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import ConfigError, StorageError
from alignlab.models import tiny
from alignlab.types import EncodedSample, Sample, Sequence, Unit

DEMONSTRATIONS = Needs(Unit.SEQUENCE)
PAIRS = Needs(Unit.PAIR)
MakeIndex = Callable[..., Index]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny.tokenizer(), max_length=300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def asked(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": f"question {number}?", "completion": answer}


def account_of(index: Index, path: Path, unit: Unit) -> Path:
    """The sample table that preparing ``index`` would have written, each sample a row of its own."""
    with SampleWriter(path, unit) as writer:
        for number in range(len(index)):
            writer.kept(number + 1, {"file": "rows.jsonl", "line": number + 1}, [index.sample(number)], {})
    return path


def recorded(index: Index, unit: Unit, folder: Path, *, steps: int | None = None, **settings: Any) -> Ledger:
    """The ledger of a whole run over ``index``."""
    plans = StepPlans(index, unit=unit, **{"global_batch_size": 4, "seed": 0, **settings})
    account = account_of(index, folder.with_suffix(".parquet"), unit)
    ledger = StepLedger(folder, account, index, unit, 0)
    for step in range(steps or plans.total_steps):
        ledger.record(plans.at(step), skipped=False)
    ledger.flush()
    return Ledger(folder)


# ---------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------


def test_every_token_of_the_index_stands_in_the_account(tmp_path: Path, encoder: Encoder) -> None:
    chat = {"id": "chat", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    first = rows_file(tmp_path / "a.jsonl", [asked(0), asked(1, " "), asked(2, "long " * 200), "no json", chat])
    second = rows_file(tmp_path / "b.jsonl", [asked(10, "twice"), asked(11, "twice too")])
    data = DataConfig(sources=[SourceConfig(first), SourceConfig(second, weight=2.0)], max_reject_fraction=0.5)
    prepared = prepare(data, DEMONSTRATIONS, encoder)
    index, manifest, table = prepared.index, prepared.manifest, read_samples(prepared.folder)
    entries = table.to_pylist()
    kept = [entry for entry in entries if entry["status"] == "kept"]
    assert [(e["id"], e["number"]) for e in kept] == [(index.sample_id(i), i) for i in range(len(index))]
    assert len({e["row"] for e in entries}) == manifest["read"] == 7
    assert len({e["row"] for e in kept}) == manifest["kept"] == 4
    assert len(kept) == manifest["samples"] == 6
    for i, entry in enumerate(kept):
        own = index.sample(i)
        assert entry["hash"] == content_hash(own)
        assert entry["tokens"] == sum(len(s.tokens) for s in own.sequences)
        assert entry["supervised"] == sum(int(s.target.sum()) for s in own.sequences)
        assert entry["sequences"] == entry["examples"] == len(own.sequences)
    assert sum(e["supervised"] for e in entries) == manifest["target_tokens"] == int(index.num_targets.sum())
    assert sum(e["tokens"] for e in entries) == manifest["tokens"] == int(index.lengths.sum())
    assert all(e["tokens"] == sum(e[f"role_{role}"] for role in ROLES) for e in entries)
    dropped = {(e["file"], e["line"]): e["reason"] for e in entries if e["status"] == "dropped"}
    assert dropped == {(first, 2): "empty_response", (first, 3): "overlong", (first, 4): "not_json"}
    assert all(e["number"] is None and e["hash"] is None for e in entries if e["status"] == "dropped")
    assert kept[2]["hash"] == kept[3]["hash"] != kept[4]["hash"]
    assert kept[2]["row"] == kept[3]["row"]


def test_what_a_kept_row_lost_is_counted_once(tmp_path: Path, encoder: Encoder) -> None:
    scores = [("good", 3), (" ", 2), ("bad " * 200, 1), ("poor", 0)]
    row = {"instruction": "q", "completions": [{"response": r, "overall_score": s} for r, s in scores]}
    source = SourceConfig(rows_file(tmp_path / "rows.jsonl", [row]), weight=2.0)
    prepared = prepare(DataConfig(sources=[source]), PAIRS, encoder)
    entries = read_samples(prepared.folder).to_pylist()
    assert [e["examples"] for e in entries] == [1, 1]
    assert [dict(e["lost"]) for e in entries] == [prepared.manifest["parts"], {}]


def test_more_rows_than_a_row_group_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    monkeypatch.setattr("alignlab.data.ledger._ROW_GROUP", 4)
    path = rows_file(tmp_path / "rows.jsonl", [asked(n, "" if n % 3 == 0 else "yes") for n in range(11)])
    prepared = prepare(DataConfig(path=path), DEMONSTRATIONS, encoder)
    table = read_samples(prepared.folder)
    assert table["line"].to_pylist() == list(range(1, 12))
    assert table["number"].drop_null().to_pylist() == list(range(7))


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is user, and how many?"},
    {"role": "assistant", "content": "a word"},
    {"role": "tool", "content": "{3: 'results'}"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "Once again: user."},
]


def spoken(encoder: Encoder, sample: Sample) -> dict[str, str]:
    """What the tokens of each role of a sample's only sequence read."""
    encoded = encoder.encode(sample)
    assert isinstance(encoded, EncodedSample)
    (sequence,) = encoded.sequences
    assert sequence.roles is not None
    return {
        role: encoder.tokenizer.decode(sequence.tokens[sequence.roles == code])
        for code, role in enumerate(ROLES)
        if (sequence.roles == code).any()
    }


def test_a_token_belongs_to_whoever_says_it(encoder: Encoder) -> None:
    assert spoken(encoder, Sample([Sequence(CONVERSATION[:5], CONVERSATION[5:])])) == {
        "system": "Be brief.",
        "user": "What is user, and how many?user",
        "assistant": "a wordOnce again: user.<|im_end|>\n",
        "tool": "{3: 'results'}",
        "template": "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
    }
    assert spoken(encoder, Sample([Sequence("ask ", "tell")])) == {"prompt": "ask ", "completion": "tell<|im_end|>"}
    rows = Encoder(None)
    (sequence,) = rows.encode(Sample([Sequence(input_ids=[5, 6, 7], target_mask=[False, True, True])])).sequences
    assert [ROLES[code] for code in sequence.roles] == ["prompt", "completion", "completion"]


def test_a_template_that_rewrites_what_is_said_shows_no_speaker() -> None:
    """Only the targets are known to be the assistant's; nothing is guessed."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | upper if m.role == 'user' else m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = Encoder(tiny.tokenizer(), chat_template=template)
    found = spoken(encoder, Sample([Sequence(CONVERSATION[1:2], [{"role": "assistant", "content": "one"}])]))
    assert found == {"assistant": "one<|im_end|>", "other": "[user]WHAT IS USER, AND HOW MANY?<|im_end|>[assistant]"}


def test_roles_are_cut_with_their_tokens() -> None:
    encoder = Encoder(tiny.tokenizer(), max_length=16, overlong="cut")
    encoded = encoder.encode(Sample([Sequence("short ", "long " * 20)]))
    assert isinstance(encoded, EncodedSample)
    assert encoded.sequences[0].roles is not None
    assert len(encoded.sequences[0].roles) == len(encoded.sequences[0].tokens) == 16


@pytest.mark.parametrize("change", ["token", "target", "pair", "weight", "label"])
def test_the_hash_is_of_everything_that_trains(make_index: MakeIndex, change: str) -> None:
    index = make_index(1, least=3, seed=3)
    one, other = index.sample(0), index.sample(0)
    other.sequences = [type(s)(s.tokens.copy(), s.target.copy()) for s in other.sequences]
    other.id, other.source = "another name", "elsewhere"
    assert content_hash(one) == content_hash(other)
    if change == "token":
        other.sequences[1].tokens[-1] += 1
    elif change == "target":
        other.sequences[1].target[-1] = False
    elif change == "pair":
        other.pairs = other.pairs[:, ::-1]
    elif change == "weight":
        other.pair_values = {**other.pair_values, "weight": other.pair_values["weight"] * 2}
    else:
        other.sequence_values = {**other.sequence_values, "label": 1 - other.sequence_values["label"]}
    assert content_hash(one) != content_hash(other)


# ---------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [Unit.SEQUENCE, Unit.PAIR])
def test_a_step_is_recorded_as_it_was_planned(make_index: MakeIndex, tmp_path: Path, unit: Unit) -> None:
    index = make_index(13, least=2, most=4)
    plans = StepPlans(index, unit=unit, global_batch_size=5, seed=0, epochs=2.5)
    steps = recorded(index, unit, tmp_path / "run", global_batch_size=5, epochs=2.5).steps.to_pylist()
    assert [step["step"] for step in steps] == list(range(1, plans.total_steps + 1))
    for step in steps:
        plan = plans.at(step["step"] - 1)
        _, samples = plans.examples(step["step"] - 1)
        assert np.repeat(step["samples"], step["examples"]).tolist() == samples.tolist()
        assert {unit: step[f"unit_{unit.value}"] for unit in Unit} == plan.totals
        assert (step["tokens"], step["epoch"], step["skipped"]) == (plan.num_tokens, plan.epoch, False)


def test_one_epoch_supervises_every_target_once(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(17, most=4)
    found = recorded(index, Unit.SEQUENCE, tmp_path / "run").summary()
    assert found["supervised_in_steps"] == found["supervised"] == int(index.num_targets.sum())
    assert found["tokens_in_steps"] == found["tokens"] == int(index.lengths.sum())
    assert found["samples"] == {"stored": 17, "distinct": 17, "seen": 17}
    assert found["times_seen"] == {"min": 1, "median": 1, "max": 1}


def test_the_targets_of_a_shared_answer_count_once_in_a_step(make_index: MakeIndex, tmp_path: Path) -> None:
    """Three pairs with one chosen answer are four sequences; cut by a border, the chosen one is in both steps."""
    index = make_index(1, least=4, most=4)
    whole = recorded(index, Unit.PAIR, tmp_path / "whole", global_batch_size=3)
    assert whole.steps["supervised"].to_pylist() == [int(index.num_targets.sum())]
    halves = recorded(index, Unit.PAIR, tmp_path / "halves", global_batch_size=2)
    chosen, *rejected = index.num_targets.tolist()
    assert halves.steps["supervised"].to_pylist() == [chosen + sum(rejected[:2]), chosen + rejected[2]]
    assert halves.times_seen.tolist() == [1.0]
    assert halves.sample("row-0")[0]["steps"] == [1, 2]


def test_times_seen_over_epochs(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(16, least=2, most=2)
    found = recorded(index, Unit.PAIR, tmp_path / "run", epochs=2.5)
    assert sorted(found.times_seen.tolist()) == [2.0] * 8 + [3.0] * 8
    name = index.sample_id(int(found.times_seen.argmin()))
    (sample,) = found.sample(name)
    assert sample["times_seen"] == len(sample["steps"]) == 2
    assert all(name in [one["id"] for one in found.step(step)["samples"]] for step in sample["steps"])


def test_a_row_used_twice_is_seen_twice_an_epoch(tmp_path: Path, encoder: Encoder) -> None:
    sources = [
        SourceConfig(rows_file(tmp_path / "a.jsonl", [asked(n) for n in range(3)])),
        SourceConfig(rows_file(tmp_path / "b.jsonl", [asked(n, "no") for n in range(10, 12)]), weight=2.0),
    ]
    prepared: Prepared = prepare(DataConfig(sources=sources), DEMONSTRATIONS, encoder)
    plans = StepPlans(prepared.index, unit=Unit.SEQUENCE, global_batch_size=2, seed=0, epochs=1)
    ledger = StepLedger(tmp_path / "run", prepared.folder / SAMPLES_FILE, prepared.index, Unit.SEQUENCE, 0)
    for step in range(plans.total_steps):
        ledger.record(plans.at(step), skipped=False)
    ledger.flush()
    found = Ledger(tmp_path / "run")
    assert found.times_seen.tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert found.summary()["samples"] == {"stored": 7, "distinct": 5, "seen": 5}
    assert found.summary()["supervised_in_steps"] == prepared.manifest["target_tokens"]
    (twice,) = found.sample("b.jsonl:1")
    assert (twice["id"], twice["copies"], twice["times_seen"]) == ("r10", 2, 2.0)


def test_partners_of_mismatched_pairs_are_not_trained_on(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(12, least=2, most=2)
    with_partners = recorded(index, Unit.SEQUENCE, tmp_path / "kto", mismatched=True)
    without = recorded(index, Unit.SEQUENCE, tmp_path / "sft")
    assert with_partners.times_seen.tolist() == [1.0] * 12
    assert with_partners.steps.drop(["tokens"]).equals(without.steps.drop(["tokens"]))


# ---------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------


def test_what_only_changes_speed_leaves_the_stream(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(24, least=2, most=4)
    settings: list[dict[str, Any]] = [
        {"dp": 1, "layout": "tree"},
        {"dp": 2, "layout": "packed", "token_budget": 64},
        {"dp": 3, "layout": "rows", "max_examples": 1},
        {"dp": 1, "layout": "tree", "merge_prompts": True},
    ]
    one, *others = [
        recorded(index, Unit.PAIR, tmp_path / str(i), global_batch_size=6, epochs=2, **s)
        for i, s in enumerate(settings)
    ]
    for other in others:
        assert parting(one, other) is None
        assert other.stream == one.stream
        assert other.steps.equals(one.steps)


def test_the_order_inside_a_step_is_not_in_its_hash() -> None:
    hashes, offsets = np.array([7, 3, 3, 2**64 - 1], dtype=np.uint64), np.array([0, 1, 0, 2])
    order = [2, 3, 0, 1]
    assert step_hash(hashes, offsets) == step_hash(hashes[order], offsets[order])
    assert step_hash(hashes, offsets) != step_hash(hashes, offsets[order])
    assert step_hash(hashes, offsets) != step_hash(hashes[:3], offsets[:3])


def test_another_seed_parts_at_the_first_step(make_index: MakeIndex, tmp_path: Path) -> None:
    index = make_index(24, least=2, most=2)
    one, other = (recorded(index, Unit.PAIR, tmp_path / f"seed-{s}", seed=s) for s in (0, 1))
    found = parting(one, other)
    assert found is not None
    assert found.step == 1
    assert one.stream != other.stream
    mine, its = ({s["id"] for s in side} for side in found.only)
    assert mine
    assert not mine & its
    assert mine <= {s["id"] for s in one.step(1)["samples"]}


def test_one_changed_row_parts_the_streams_where_it_is_first_seen(tmp_path: Path, encoder: Encoder) -> None:
    folders = []
    for name, answer in (("one", "yes"), ("other", "no")):
        (tmp_path / name).mkdir()
        rows = [asked(n, answer if n == 5 else "yes") for n in range(12)]
        prepared = prepare(DataConfig(path=rows_file(tmp_path / name / "rows.jsonl", rows)), DEMONSTRATIONS, encoder)
        plans = StepPlans(prepared.index, unit=Unit.SEQUENCE, global_batch_size=3, seed=0, epochs=1)
        folders.append(tmp_path / name / "ledger")
        ledger = StepLedger(folders[-1], prepared.folder / SAMPLES_FILE, prepared.index, Unit.SEQUENCE, 0)
        for step in range(plans.total_steps):
            ledger.record(plans.at(step), skipped=False)
        ledger.flush()
    one, other = map(Ledger, folders)
    found = parting(one, other)
    assert found is not None
    assert [found.step] == one.sample("r5")[0]["steps"]
    assert [[s["id"] for s in side] for side in found.only] == [["r5"], ["r5"]]


# ---------------------------------------------------------------------------------------------------------------
# Death and resume
# ---------------------------------------------------------------------------------------------------------------


class Run:
    """A run that records steps, and may be killed anywhere: what was not flushed is gone."""

    def __init__(self, index: Index, folder: Path) -> None:
        self.index, self.folder = index, folder
        self.plans = StepPlans(index, unit=Unit.PAIR, global_batch_size=2, seed=0, epochs=2)
        self.account = account_of(index, folder.with_suffix(".parquet"), Unit.PAIR)

    def steps(self, first: int, last: int, *, flush: tuple[int, ...]) -> None:
        """Start after ``first`` steps and do those up to ``last``, with segments written behind some."""
        ledger = StepLedger(self.folder, self.account, self.index, Unit.PAIR, first)
        for step in range(first, last):
            ledger.record(self.plans.at(step), skipped=False)
            if step + 1 in flush:
                ledger.flush()


@pytest.mark.parametrize(
    ("killed_at", "flushed", "checkpoint"),
    [
        (6, (4,), 4),  # between two checkpoints
        (8, (4, 8), 4),  # behind the segment, before the checkpoint was published
        (8, (4, 8), 8),  # just behind the checkpoint
        (9, (4, 8), 3),  # the newest checkpoint is damaged, an older one inside a segment is taken
        (3, (2,), 0),  # before the first checkpoint
    ],
)
def test_resume_leaves_every_step_once(
    make_index: MakeIndex, tmp_path: Path, killed_at: int, flushed: tuple[int, ...], checkpoint: int
) -> None:
    index = make_index(12, least=2, most=2)
    whole, killed = Run(index, tmp_path / "whole"), Run(index, tmp_path / "killed")
    whole.steps(0, 12, flush=(12,))
    killed.steps(0, killed_at, flush=flushed)
    killed.steps(checkpoint, 12, flush=(12,))
    found, expected = Ledger(killed.folder), Ledger(whole.folder)
    assert found.numbers.tolist() == list(range(1, 13))
    assert found.missing == []
    on_disk = [parquet.read_metadata(path).num_rows for path in killed.folder.glob("steps-*")]
    assert sum(on_disk) == 12  # what was done again is cut, not only passed over
    assert found.steps.equals(expected.steps)
    assert found.stream == expected.stream
    assert not list(killed.folder.glob(".*"))


def test_a_kill_inside_the_cut_is_repaired(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_index(12, least=2, most=2), tmp_path / "run")
    run.steps(0, 8, flush=(8,))
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Segments(run.folder, STEPS_NAME, STEPS).cut(5)
    assert len(list(run.folder.glob("steps-*"))) == 2
    assert read_steps(run.folder)["step"].to_pylist() == list(range(1, 9))  # no step twice, even now
    (run.folder / ".steps-000000006-000000008.parquet.tmp").write_bytes(b"half")
    run.steps(5, 12, flush=(12,))
    assert Ledger(run.folder).numbers.tolist() == list(range(1, 13))
    assert sorted(path.name for path in run.folder.iterdir() if path.name != SAMPLES_FILE) == [
        "steps-000000001-000000005.parquet",
        "steps-000000006-000000012.parquet",
    ]


def test_a_run_that_began_elsewhere_says_what_it_did_not_record(make_index: MakeIndex, tmp_path: Path) -> None:
    run = Run(make_index(12, least=2, most=2), tmp_path / "run")
    run.steps(9, 12, flush=(12,))
    assert Ledger(run.folder).missing == list(range(1, 10))


def test_memory_is_bounded_without_checkpoints(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignlab.data.ledger._BUFFERED", 6)
    run = Run(make_index(12, least=2, most=2), tmp_path / "run")
    run.steps(0, 12, flush=())
    assert read_steps(run.folder)["step"].to_pylist() == list(range(1, 13))


def test_damage_is_named(make_index: MakeIndex, tmp_path: Path) -> None:
    run = Run(make_index(12, least=2, most=2), tmp_path / "run")
    with pytest.raises(StorageError, match=r"samples\.parquet: missing"):
        Ledger(run.folder)
    run.steps(0, 12, flush=(6, 12))
    segment = run.folder / "steps-000000001-000000006.parquet"
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"steps-000000001-000000006\.parquet: damaged"):
        Ledger(run.folder)


def test_an_account_of_another_index_is_refused(make_index: MakeIndex, tmp_path: Path) -> None:
    account = account_of(make_index(5), tmp_path / "account.parquet", Unit.PAIR)
    with pytest.raises(StorageError, match="5 samples where the index has 6"):
        StepLedger(tmp_path / "run", account, make_index(6), Unit.PAIR, 0)


def test_what_is_not_there_is_said(make_index: MakeIndex, tmp_path: Path) -> None:
    found = recorded(make_index(6, least=2), Unit.PAIR, tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match="step 2 is not in the ledger, which holds 1 to 1"):
        found.step(2)
    with pytest.raises(ConfigError, match=r"no sample 'row-9' in the ledger; give an id \(such as 'row-0', 'row-1'"):
        found.sample("row-9")
