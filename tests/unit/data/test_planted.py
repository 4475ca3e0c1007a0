"""Planted faults are all found where they were planted, for every objective; clean rows give no alarm."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from alignlab.config import DataConfig, ModelConfig, ReferenceConfig, RootConfig
from alignlab.configuration.names import default_name
from alignlab.configuration.schema import objective_config
from alignlab.data import cache
from alignlab.data.overlap import Examples, Recorder, compare, found_in, hashes, normalised
from alignlab.data.prepare import Prepared
from alignlab.data.sources import Needs
from alignlab.data.template import Encoder
from alignlab.errors import ConfigError, DataError
from alignlab.models import tiny
from alignlab.registry import OBJECTIVES
from alignlab.runs.header import findings_text
from alignlab.runs.job import assemble, needs_of, prepare_data, reference_job
from alignlab.types import Pair, Sample, Unit
from alignlab.types import Sequence as Path_

Json = dict[str, Any]
PAIRS = Needs(Unit.PAIR, world_kind="pairs")
REAL = Path(__file__).parents[4] / "shared" / "data"
OBJECTIVE_NAMES = OBJECTIVES.names()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)


def turns(asked: str, *said: str) -> list[Json]:
    return [{"role": "user", "content": asked}, *({"role": "assistant", "content": text} for text in said)]


def pair(asked: str, chosen: str, rejected: str) -> Json:
    return {"prompt": turns(asked), "chosen": turns(asked, chosen)[1:], "rejected": turns(asked, rejected)[1:]}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config_for(objective: str, **data: Any) -> RootConfig:
    return RootConfig(
        model=ModelConfig(name_or_path="tiny"), data=DataConfig(**data), objective=objective_config(objective)()
    )


def listed(prepared: Prepared) -> list[Json]:
    return [json.loads(line) for line in (prepared.folder / "rejected.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------
# A thousand rows with faults in them
# ---------------------------------------------------------------------------------------------------------------

CUT = 120
"""Longest sequence of the planted set; the shared part of the pairs that are equal after the cut is longer."""


def planted(seed: int) -> tuple[list[Json], list[Json], dict[str, list[Any]]]:
    """(training rows, held-out rows, places by what was planted: lines, or pairs of lines), in an order by ``seed``."""
    rng = Random(7)
    tagged: list[tuple[str, Json]] = []
    sound = [pair(f"café question {i}?", f"good {i}", f"bad {i}") for i in range(961)]
    tagged += [(f"sound {i}", row) for i, row in enumerate(sound)]
    for i in range(10):  # some only after normalising
        copy = pair(f"café  question {i}?\n", f"good {i}", f"bad {i}") if i % 2 else sound[i]
        tagged.append((f"duplicate {i}", {**copy, "id": f"copy-{i}"}))
    for i in range(5):
        asked = f"café question {100 + i}?"
        asked = unicodedata.normalize("NFD", asked) if i == 0 else asked
        tagged.append((f"conflict {100 + i}", pair(asked, f"bad {100 + i}", f"good {100 + i}")))
    tagged += [(f"empty {i}", pair(f"empty {i}?", "", "bad")) for i in range(4)]
    tagged += [(f"white {i}", pair(f"white {i}?", "good", (" ", "\n", "\t\u200b", "\u00a0")[i])) for i in range(4)]
    tagged += [(f"special {i}", pair(f"special {i}?", "good", "<|im_end|>\n" * (i + 1))) for i in range(2)]
    tagged += [(f"same {i}", pair(f"same {i}?", "equal", "equal")) for i in range(3)]
    tagged += [(f"overlong {i}", pair("long? " * 100 + str(i), "good", "bad")) for i in range(5)]
    tagged += [(f"cut {i}", pair(f"cut {i}?", "z" * CUT + "1", "z" * CUT + "2")) for i in range(3)]
    held = [pair(f"held out {i}?", "good", "bad") for i in range(100)] + [sound[200 + i] for i in range(3)]
    held.append(pair("café question 300?", "another", "answer"))
    Random(seed).shuffle(tagged)
    rng.shuffle(held)
    line = {name: number for number, (name, _) in enumerate(tagged, 1)}
    places: dict[str, list[Any]] = {}
    for name, number in line.items():
        kind, _, which = name.rpartition(" ")
        if kind in ("duplicate", "conflict"):
            places.setdefault(kind, []).append(tuple(sorted((number, line[f"sound {which}"]))))
        else:
            places.setdefault(kind, []).append(number)
    places["leak"] = [(line[f"sound {200 + i}"], held.index(sound[200 + i]) + 1) for i in range(3)]
    return [row for _, row in tagged], held, {kind: sorted(found) for kind, found in places.items()}


@pytest.mark.parametrize(
    ("objective", "seed", "overlong"), [("dpo", 0, "drop"), ("dpo", 1, "cut"), ("dpo", 2, "cut"), ("reward", 0, "cut")]
)
def test_what_was_planted_is_found_whatever_the_order(objective: str, seed: int, overlong: str, tmp_path: Path) -> None:
    rows, held, places = planted(seed)
    train_path, held_path = write(tmp_path / "train.jsonl", rows), write(tmp_path / "held.jsonl", held)
    data = {"path": train_path, "eval_path": held_path, "max_length": str(CUT), "overlong": overlong}
    found = prepare_data(config_for(objective, **data, leaks="keep"))
    manifest = found.train.manifest
    empty = sorted(places["empty"] + places["white"] + places["special"])
    same = sorted(places["same"] + (places["cut"] if overlong == "cut" else []))
    # With drop the pairs that differ behind the cut are overlong; with cut the overlong prompts leave no target.
    long = sorted(places["overlong"] + (places["cut"] if overlong == "drop" else []))
    long_reason = "overlong" if overlong == "drop" else "no_target"
    by_reason: dict[str, list[int]] = {}
    for entry in listed(found.train):
        assert entry["file"] == train_path
        by_reason.setdefault(entry["reason"], []).append(entry["line"])
    assert {k: sorted(v) for k, v in by_reason.items()} == {
        "empty_response": empty, "identical_pair": same, long_reason: long,
    }  # fmt: skip
    assert manifest["dropped"] == {reason: len(lines) for reason, lines in by_reason.items()}
    assert manifest["findings"] == {"duplicate": 10, "conflict": 5}
    entries = list(found.findings())
    for kind in ("duplicate", "conflict"):
        mine = [e for e in entries if e["finding"] == kind]
        assert sorted(tuple(sorted((e["line"], e["other"]["line"]))) for e in mine) == places[kind]
        assert all(e["file"] == e["other"]["file"] == train_path and e["rows"] == "train" for e in mine)
    leaks = [e for e in entries if e["finding"] == "leak"]
    assert sorted((e["line"], e["other"]["line"]) for e in leaks) == places["leak"]
    assert {(e["file"], e["other"]["file"]) for e in leaks} == {(train_path, held_path)}
    assert found.overlap.counts == {"leak": 3, "shared_prompt": 1}
    text = findings_text(found.accounts())
    assert text == (
        "conflict 5, duplicate 10 in the training rows; 3 training examples are held out too; "
        "1 prompts are held out too, with other answers"
    )


def test_a_leak_stops_or_is_left_out_or_is_kept_as_told(tmp_path: Path) -> None:
    rows, held, places = planted(0)
    train_path, held_path = write(tmp_path / "train.jsonl", rows), write(tmp_path / "held.jsonl", held)
    config = config_for("dpo", path=train_path, eval_path=held_path)
    line, other = places["leak"][0]
    with pytest.raises(DataError) as error:
        prepare_data(config)
    assert str(error.value) == (
        f"{train_path}: line {line}: the same example is held out ({held_path}: line {other}), 3 in all; "
        "data.leaks=drop leaves them out of training, data.leaks=keep goes on"
    )
    assert error.value.exit_code == 2
    kept = prepare_data(replace(config, data=replace(config.data, leaks="keep")))
    dropped = prepare_data(replace(config, data=replace(config.data, leaks="drop")))
    assert dropped.train.manifest["dropped"] == {**kept.train.manifest["dropped"], "leak": 3}
    assert dropped.train.manifest["read"] == kept.train.manifest["read"] == len(rows)
    assert len(dropped.train.index) == len(kept.train.index) - 3
    assert len(dropped.held_out.index) == len(kept.held_out.index) == len(held)  # type: ignore[union-attr]
    leaks = [entry for entry in listed(dropped.train) if entry["reason"] == "leak"]
    assert sorted((e["line"], e["other"]["line"]) for e in leaks) == places["leak"]
    assert dropped.overlap.counts == {"shared_prompt": 1}


def test_the_cache_carries_the_findings(tmp_path: Path) -> None:
    rows, held, _ = planted(0)
    data = {"path": write(tmp_path / "t.jsonl", rows), "eval_path": write(tmp_path / "h.jsonl", held), "leaks": "keep"}
    first, second = (prepare_data(config_for("dpo", **data)) for _ in range(2))
    assert (first.train.fresh, second.train.fresh) == (True, False)
    assert first.accounts() == second.accounts()
    assert list(first.findings()) == list(second.findings())
    assert len(list(first.findings())) == 19


def test_of_a_row_with_several_examples_only_the_leaked_ones_go(tmp_path: Path) -> None:
    def rated(asked: str, **ratings: int) -> Json:
        return {"instruction": asked, "completions": [{"response": r, "scores": {"x": s}} for r, s in ratings.items()]}

    train = write(tmp_path / "t.jsonl", [rated("q", a=3, b=2, c=1), rated("r", a=2, b=1), rated("s", a=1, b=2)])
    held = write(tmp_path / "h.jsonl", [rated("q", a=5, b=4), rated("r", a=9, b=8)])
    found = prepare_data(config_for("dpo", path=train, eval_path=held, leaks="drop"))
    assert found.train.manifest["dropped"] == {"leak": 1}
    assert found.train.manifest["parts"] == {"leak": 1}
    assert found.train.manifest["pairs"] == 3, "two of the first row's three, and the last row's"
    conditioned = prepare_data(config_for("cpo", path=train, eval_path=held, leaks="drop"))
    assert conditioned.train.manifest["dropped"]["leak"] == 1


def test_only_leaks_that_leave_rows_out_are_another_run() -> None:
    names = {leaks: default_name(config_for("dpo", path="x.jsonl", leaks=leaks)) for leaks in ("error", "keep", "drop")}
    assert names["error"] == names["keep"] != names["drop"]


# ---------------------------------------------------------------------------------------------------------------
# What equals what
# ---------------------------------------------------------------------------------------------------------------


def one(*said: str, prompt: Any = "q", label: bool | None = None) -> Sample:
    return Sample([Path_(prompt, text, label=label) for text in said])


def test_texts_equal_but_for_form_and_space_are_equal() -> None:
    assert normalised(" e\u0301\t\n x ") == normalised("é x") == "é x"
    assert normalised("É x") != normalised("é x")
    chat = Sample([Path_(turns("q"), turns("q", "a")[1:])])
    assert hashes(chat) == hashes(one("a", prompt="q"))
    assert hashes(chat) != hashes(Sample(chat.sequences, tools=[{"name": "f"}]))
    system = [{"role": "system", "content": "s"}, *turns("q")]
    assert hashes(Sample([Path_(system, turns("q", "a")[1:])])) != hashes(chat)


def test_labels_and_the_order_of_a_pair_make_contraries() -> None:
    good, bad = hashes(one("a", label=True))[0], hashes(one("a", label=False))[0]
    assert (good.example, good.contrary) == (bad.contrary, bad.example)
    a = hashes(Sample(one("x", "y").sequences, [Pair(0, 1)]))[0]
    b = hashes(Sample(one("x", "y").sequences, [Pair(1, 0)]))[0]
    assert (a.example, a.contrary) == (b.contrary, b.example)
    assert hashes(one("a"))[0].contrary == 0


def test_token_rows_are_compared_by_their_ids() -> None:
    def row(ids: list[int], start: int) -> Sample:
        return Sample([Path_(input_ids=ids, target_mask=[i >= start for i in range(len(ids))])])

    same, longer = hashes(row([1, 2, 3], 2))[0], hashes(row([1, 2, 4], 2))[0]
    assert same == hashes(row([1, 2, 3], 2))[0]
    assert same.prompt == longer.prompt
    assert same.example != longer.example
    assert same.example != hashes(row([1, 2, 3], 1))[0].example


def examples_of(samples: Sequence[Sample], folder: Path) -> Examples:
    folder.mkdir()
    recorder = Recorder()
    for number, sample in enumerate(samples, 1):
        recorder.add("f", number, hashes(sample))
    made, stored = recorder.close(folder), Examples.open(folder)
    assert all(np.array_equal(getattr(made, n), getattr(stored, n)) for n in ("example", "prompt", "line"))
    return stored


def test_rows_without_a_prompt_share_none(tmp_path: Path) -> None:
    train = examples_of([one("a", prompt=""), one("b", prompt="")], tmp_path / "t")
    held = examples_of([one("c", prompt="")], tmp_path / "h")
    assert not compare(train, held).counts
    assert not found_in(train)[0]


def test_what_a_row_says_twice_itself_is_no_duplicate(tmp_path: Path) -> None:
    sample = Sample(one("a", "a", "b").sequences, [Pair(0, 2), Pair(1, 2)])
    assert not found_in(examples_of([sample], tmp_path / "t"))[0]
    counts, _ = found_in(examples_of([sample, sample, sample], tmp_path / "u"))
    assert counts == {"duplicate": 2}


def test_a_million_examples_stay_small(tmp_path: Path) -> None:
    """36 bytes an example while rows are read; the comparison holds a few arrays of 8 bytes more."""
    recorder = Recorder()
    recorder.add("f", 1, hashes(one("a")))
    assert sum(values.itemsize for values in recorder._arrays.values()) == 36


# ---------------------------------------------------------------------------------------------------------------
# Clean sets
# ---------------------------------------------------------------------------------------------------------------


def alarms(config: RootConfig) -> Json:
    found = prepare_data(config)
    sides = {side: dict(manifest.get("findings", {})) for side, manifest in found.accounts().items()}
    assert not findings_text(found.accounts()) or any(sides.values()) or found.overlap.counts
    return {name: counts for name, counts in {**sides, "both": dict(found.overlap.counts)}.items() if counts}


@pytest.mark.parametrize("objective", ["sft", "dpo", "reward", "cpo"])
def test_the_built_in_world_gives_no_alarm(objective: str) -> None:
    options = {"rows": 300, "eval_rows": 100}
    assert alarms(config_for(objective, path="sums", eval_path="sums", options=options)) == {}
    assert alarms(config_for(objective, path="sums", eval_fraction=0.3, options=options)) == {}


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_generated_rows_give_no_alarm(objective: str, tmp_path: Path) -> None:
    rows = [pair(f"question {i}?", f"answer {i % 7}", f"no {i % 5}") for i in range(400)]
    data = {"path": write(tmp_path / "t.jsonl", rows[:300]), "eval_path": write(tmp_path / "h.jsonl", rows[300:])}
    assert alarms(config_for(objective, **data)) == {}


REAL_CLEAN = (
    ("dpo", "safety/hh_harmless"),
    ("kto", "kto/llamafactory_kto_en"),
    ("sft", "medical/pubmedqa"),
)


@pytest.mark.parametrize(("objective", "name"), REAL_CLEAN, ids=[name for _, name in REAL_CLEAN])
def test_clean_real_rows_give_no_alarm(objective: str, name: str) -> None:
    paths = [REAL / f"{name}.{split}.jsonl.gz" for split in ("train", "test")]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real rows are not here")
    assert alarms(config_for(objective, path=str(paths[0]), eval_path=str(paths[1]))) == {}


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_share_by_prompt_never_leaks(objective: str, tmp_path: Path) -> None:
    """Every prompt stands in five forms that are equal after normalising."""
    forms: tuple[Callable[[str], str], ...] = (
        str, lambda t: f" {t}", lambda t: t.replace(" ", "  "), lambda t: f"{t}\n",
        lambda t: unicodedata.normalize("NFD", t),
    )  # fmt: skip
    rows = [pair(form(f"café question {i}?"), f"good {n}", "bad") for i in range(60) for n, form in enumerate(forms)]
    found = prepare_data(config_for(objective, path=write(tmp_path / "t.jsonl", rows), eval_fraction=0.4))
    assert found.held_out is not None
    assert len(found.train.index) + len(found.held_out.index) == 300
    assert 20 < len(found.held_out.index) < 280
    assert not found.overlap.counts


# ---------------------------------------------------------------------------------------------------------------
# Nothing said, and too much said
# ---------------------------------------------------------------------------------------------------------------

NOTHING = ("", " ", "\n", " \t\r\n", "\u200b\ufeff", "<|im_end|>", " <|im_start|><|im_end|>\n")


def as_eaten(objective: str, asked: str, good: str, bad: str) -> Json:
    """A row that every objective of its kind can eat."""
    if needs_of(OBJECTIVES.get(objective)(objective_config(objective)())).stage:
        rated = [{"response": text, "scores": {"help": score}} for text, score in ((good, 5), (bad, 1))]
        return {"instruction": asked, "completions": rated}
    return pair(asked, good, bad)


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_a_response_that_says_nothing_is_not_trained_on(objective: str, tmp_path: Path) -> None:
    sound = [as_eaten(objective, f"sound {i}", "good", "bad") for i in range(3)]
    faulty = [as_eaten(objective, f"faulty {i}", text, text) for i, text in enumerate(NOTHING)]
    found = prepare_data(config_for(objective, path=write(tmp_path / "rows.jsonl", [*faulty, *sound])))
    assert found.train.manifest["kept"] == 3
    dropped = {entry["line"]: entry["reason"] for entry in listed(found.train)}
    assert set(dropped) == set(range(1, len(NOTHING) + 1))
    assert set(dropped.values()) == {"empty_response"}
    assert (found.train.index.num_targets > 0).all()
    plain = [{"prompt": "p", "completion": text} for text in NOTHING]
    if needs_of(found.objective) == Needs(Unit.SEQUENCE):
        with pytest.raises(DataError, match=f"dropped: empty_response {len(NOTHING)}"):
            prepare_data(config_for(objective, path=write(tmp_path / "plain.jsonl", plain)))


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_rows_are_dropped_from_one_token_over_the_longest_length_on(objective: str, tmp_path: Path) -> None:
    rows = [as_eaten(objective, "q" * n, "good", "dull") for n in (10, 20, 30, 40)]
    path = write(tmp_path / "rows.jsonl", rows)
    whole = prepare_data(config_for(objective, path=path))
    index = whole.train.index
    lengths = sorted({int(max(len(s.tokens) for s in index.sample(i).sequences)) for i in range(len(index))})
    longest = lengths[-1]

    def kept(most: int, overlong: str = "drop") -> tuple[int, Counter[str]]:
        data = {"path": path, "max_length": str(most), "overlong": overlong}
        manifest = prepare_data(config_for(objective, **data)).train.manifest
        return manifest["kept"], Counter(manifest["dropped"]) + Counter(manifest["parts"])

    assert kept(longest) == (4, {}), "exactly at"
    count, reasons = kept(longest - 1)
    assert count in (3, 4), "one over; of conditioned rows another condition may fit"
    assert set(reasons) == {"overlong"}
    with pytest.raises(DataError, match=r"4 read, dropped: overlong 4 \(raise data\.max_length"):
        kept(12)
    cut, _ = kept(longest - 1, "cut")
    assert cut == 4
    with pytest.raises(DataError, match="no row is left"):
        kept(4, "cut")
    with pytest.raises(DataError, match=r"rows\.jsonl: line \d: row .*longer than data\.max_length"):
        kept(longest - 1, "error")


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_pairs_that_become_equal_are_dropped(objective: str, tmp_path: Path) -> None:
    """In text; but for a space that the template strips; behind the cut; in the token that the cut takes."""
    template = tiny.CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content | trim }}")
    head = len(Encoder(tiny.tokenizer()).render_prompt(turns("q")))
    rows = [pair("q", "same", "same"), pair("q", "same", "same "), pair("q", "abcdefgh", "abcdefxy"),
            pair("q", "abcdef", "abcdefx"), pair("q", "abcd", "abce")]  # fmt: skip
    config = config_for(objective, path=write(tmp_path / "rows.jsonl", rows), max_length=str(head + 6), overlong="cut")
    found = prepare_data(replace(config, model=replace(config.model, chat_template=template)))
    assert found.train.manifest["dropped"] == {"identical_pair": 4}
    assert [entry["line"] for entry in listed(found.train)] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------
# A tokenizer of another model
# ---------------------------------------------------------------------------------------------------------------


def swapped_folder(folder: Path, one_token: str = "Ġapples", other: str = "Ġbooks") -> str:
    """``tiny`` as a folder, with a tokenizer of equal size in which two tokens have each other's ids."""
    model, tokenizer = tiny.load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = json.loads((folder / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    places = [next(i for i, (token, _) in enumerate(vocab) if token == name) for name in (one_token, other)]
    vocab[places[0]], vocab[places[1]] = vocab[places[1]], vocab[places[0]]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return str(folder)


def test_a_reference_with_two_ids_swapped_is_refused(tmp_path: Path) -> None:
    rows = [pair(f"question {i}?", "good", "bad") for i in range(4)]
    config = config_for("dpo", path=write(tmp_path / "rows.jsonl", rows))
    other = swapped_folder(tmp_path / "other")
    config = replace(config, reference=ReferenceConfig(name_or_path=other))
    job = assemble(config, prepare_data(config))
    with pytest.raises(ConfigError, match=r"other has another tokenizer than the policy: token 'Ġ\w+' is \d+ here"):
        reference_job(job)


def test_swapped_ids_make_another_index_so_no_checkpoint_of_it_is_resumed(tmp_path: Path) -> None:
    rows = [pair(f"Tom has {i} apples and books?", "good", "bad") for i in range(4)]
    config = config_for("dpo", path=write(tmp_path / "rows.jsonl", rows))
    other = swapped_folder(tmp_path / "other")
    changed = replace(config, model=replace(config.model, tokenizer_name_or_path=other))
    assert prepare_data(config).train.index.hash != prepare_data(changed).train.index.hash


def test_a_token_id_beyond_the_embedding_names_its_row(tmp_path: Path) -> None:
    size = len(tiny.tokenizer())
    rows = [{"input_ids": [5, 6, last], "prompt_length": 1} for last in (7, size - 1, size)]
    config = config_for("sft", path=write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ConfigError, match=rf"rows\.jsonl: line 3: token id {size}, but the embedding of tiny has only"):
        assemble(config, prepare_data(config))
    assemble(*(lambda fits: (fits, prepare_data(fits)))(replace(config, data=replace(config.data, limit=2))))


def test_a_model_without_a_template_says_so_at_the_first_row(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    model, tokenizer = tiny.load()
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = config_for("sft", path=write(tmp_path / "rows.jsonl", [{"messages": turns("q", "a")}]))
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: .*no chat template; name one with model\.chat_template"):
        prepare_data(replace(config, model=replace(config.model, name_or_path=str(folder))))


def test_padding_with_the_terminator_changes_no_number(tmp_path: Path) -> None:
    """Targets are spans and padding is masked, so a tokenizer whose pad is its EOS is no other one."""
    rows = [pair(f"question {i}?", "good " * i, "bad") for i in range(1, 5)]
    losses = []
    for name in ("own", "eos"):
        folder = tmp_path / name
        model, tokenizer = tiny.load()
        if name == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = config_for("sft", path=write(tmp_path / "rows.jsonl", rows))
        config = replace(config, model=replace(config.model, name_or_path=str(folder), layout="rows"))
        job = assemble(config, prepare_data(config))
        assert (job.data.tokenizer.pad_token_id == job.data.tokenizer.eos_token_id) is (name == "eos")
        batch = next(iter(job.loader.of(job.plans.at(0))))
        assert batch.attention_mask is not None
        assert not batch.attention_mask.bool().all(), "something is padded"
        with torch.no_grad():
            from alignlab.types import Ask

            losses.append(job.engine.score(batch, Ask()).logps)
    assert torch.equal(*losses)
