"""Reference numbers are computed once, by one job, and read by all others that ask for the same."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignlab import dist
from alignlab.configuration.compose import compose
from alignlab.data import cache
from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.plan import StepPlans, sequential
from alignlab.data.random_trees import random_sample, write_index
from alignlab.errors import ConfigError, NumericsError, StorageError
from alignlab.runs.job import assemble, attach_reference, prepare_data
from alignlab.train import reference
from alignlab.train.reference import Reference, reference_logps
from alignlab.types import Scores, Unit

KEY = {"model": "m", "index": "i"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "sync_where_possible", lambda path: None)
    monkeypatch.setattr(reference, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    rng = np.random.default_rng(0)
    return write_index(tmp_path_factory.mktemp("rows") / "index", (random_sample(rng, n) for n in range(6)))


class Engine:
    """One rank that scores a target by its number; ``gate`` holds the first score back until it is set."""

    dp, rank, device = 1, 0, torch.device("cpu")

    def __init__(self, gate: threading.Event | None = None, factor: float = -0.1) -> None:
        self.gate, self.factor = gate, factor
        self.begun = threading.Event()

    def score(self, batch: Any, ask: Any) -> Scores:
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        return Scores(logps=self.factor * (1.0 + batch.targets.double()))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


def ask(index: Index, engine: Engine, key: dict[str, Any] = KEY, **options: Any) -> Reference:
    loader = Loader(index, "tree", torch.device("cpu"), torch.float64, 0)
    everything = lambda: sequential(index, unit=Unit.SEQUENCE, token_budget=40)  # noqa: E731
    return reference_logps(engine, loader, everything, key, index.num_sequences, **options)


@contextmanager
def opened_at_last(gate: threading.Event) -> Iterator[None]:
    """However a test ends, nobody waits at the gate."""
    try:
        yield
    finally:
        gate.set()


def by_hand(index: Index) -> list[float]:
    sequences = [index.sequence(number) for number in range(index.num_sequences)]
    return [float(-0.1 * (1.0 + one.tokens[one.target].astype(float)).sum()) for one in sequences]


def left_over() -> list[str]:
    """What is in the cache beside whole entries."""
    return [path.name for path in (cache.root() / "reference").iterdir() if not path.is_dir() or path.name[0] == "."]


def test_the_second_job_reads_what_the_first_computed(index: Index) -> None:
    first, second = Engine(), Engine()
    computed, found = ask(index, first), ask(index, second)
    assert computed.seconds > 0
    assert computed.sequences == pytest.approx(by_hand(index))
    assert not second.begun.is_set()
    assert found.seconds == 0.0
    assert found.sequences.tolist() == computed.sequences.tolist()
    assert ask(index, other := Engine(), {**KEY, "model": "another"}).seconds > 0
    assert other.begun.is_set()
    assert left_over() == []


def test_of_two_jobs_at_once_one_computes_and_the_other_waits(index: Index) -> None:
    gate = threading.Event()
    first, second = Engine(gate), Engine()
    told: list[str] = []
    waiting = threading.Event()

    def say(text: str) -> None:
        told.append(text)
        waiting.set()

    with ThreadPoolExecutor(2) as pool, opened_at_last(gate):
        computed = pool.submit(ask, index, first)
        assert first.begun.wait(20)
        found = pool.submit(ask, index, second, say=say)
        assert waiting.wait(20)
        assert not found.done()
        gate.set()
        assert found.result(20).sequences.tolist() == computed.result(20).sequences.tolist()
    assert not second.begun.is_set()
    assert found.result().seconds == 0.0
    assert len(told) == 1
    assert "reference log-probabilities" in told[0]
    assert left_over() == []


def test_a_job_that_failed_is_followed(index: Index) -> None:
    gate = threading.Event()
    first, second = Engine(gate, factor=float("nan")), Engine()
    waiting = threading.Event()
    with ThreadPoolExecutor(2) as pool, opened_at_last(gate):
        failed = pool.submit(ask, index, first)
        assert first.begun.wait(20)
        found = pool.submit(ask, index, second, say=lambda text: waiting.set())
        assert waiting.wait(20)
        gate.set()
        with pytest.raises(NumericsError, match="not finite"):
            failed.result(20)
        assert found.result(20).seconds > 0
    assert found.result().sequences == pytest.approx(by_hand(index))
    assert left_over() == []


def test_a_job_that_was_killed_is_followed_and_swept_up_after(index: Index) -> None:
    ask(index, Engine())
    (entry,) = cache.listing()
    cache.remove("reference")
    claim = cache.Claim(entry.path)
    assert claim.take()  # and nobody keeps it: no process with that number exists any more
    text = claim.path.read_text().replace(f'"pid": {claim._me["pid"]}', '"pid": 4194303')
    claim.path.write_text(text)
    half = entry.path.with_name(f".{entry.key}.0123")
    half.mkdir()
    assert ask(index, Engine()).seconds > 0
    assert left_over() == []


OWNER = """
import sys, time
from pathlib import Path
from alignlab.data import cache
claim = cache.Claim(Path(sys.argv[1]))
assert claim.take()
with claim:
    print("mine", flush=True)
    time.sleep(60)
"""


def test_the_owner_is_another_process_and_is_killed(index: Index) -> None:
    """While it lives there is a wait; as soon as it is dead its work is taken over, half a minute early."""
    ask(index, Engine())
    (entry,) = cache.listing()
    cache.remove("reference")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(entry.path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "mine\n"
    told: list[str] = []
    waiting = threading.Event()
    engine = Engine()

    def say(text: str) -> None:
        told.append(text)
        waiting.set()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(ask, index, engine, say=say)
        assert waiting.wait(20)
        assert f"process {owner.pid} on" in told[0]
        assert not engine.begun.is_set()
        owner.kill()
        owner.wait()
        assert found.result(20).seconds > 0
    owner.stdout.close()
    assert left_over() == []


JOB = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_reference import Engine, ask
from alignlab.data.index import Index

class Watched(Engine):
    def score(self, batch, asked):
        Path(sys.argv[3], f"scored-{os.getpid()}").touch()
        time.sleep(0.05)
        return super().score(batch, asked)

Path(sys.argv[3], f"ready-{os.getpid()}").touch()
while len(list(Path(sys.argv[3]).glob("ready-*"))) < 3:
    time.sleep(0.001)
found = ask(Index.open(sys.argv[2]), Watched())
print(found.seconds > 0, found.sequences.sum())
"""


@pytest.mark.nightly
def test_of_three_processes_at_once_one_computes(index: Index, tmp_path: Path) -> None:
    words = [sys.executable, "-c", JOB, str(Path(__file__).parent), str(index.folder), str(tmp_path)]
    jobs = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert sorted(computed for computed, _ in told) == ["False", "False", "True"]
    assert len({total for _, total in told}) == 1
    assert len(list(tmp_path.glob("scored-*"))) == 1
    assert left_over() == []


def test_numbers_that_are_not_there_are_not_computed_unasked(index: Index) -> None:
    with pytest.raises(ConfigError, match="reference=true"):
        ask(index, Engine(), compute=False)
    assert not (cache.root() / "reference").exists()
    ask(index, Engine())
    assert ask(index, Engine(), compute=False).seconds == 0.0


def test_partners_are_kept_too(index: Index) -> None:
    plans = StepPlans(index, unit=Unit.SEQUENCE, global_batch_size=5, seed=0, mismatched=True)
    steps = [plans.at(step) for step in range(plans.total_steps)]
    computed = ask(index, Engine(), mismatched=steps)
    found = ask(index, Engine(), mismatched=[])
    assert found.mismatched == computed.mismatched
    assert sorted(found.mismatched) == sorted(
        {tuple(pair) for one in steps for pair in one.mismatched_pairs().tolist()}
    )


def test_partners_of_grouped_prompts_are_numbers_of_their_own(tmp_path: Path) -> None:
    """The same rows, seed and batch, in another order: other partners, which the first job's entry does not hold."""
    rows = [
        {"prompt": f"What is {number} and {number}?", "completion": f"{number + place}", "label": place == 0}
        for place in range(3)
        for number in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["objective=kto", "model=tiny", f"data={tmp_path / 'rows.jsonl'}", "engine=local"]
    for merge in ("false", "global"):
        config = compose([*words, "train.global_batch_size=6", f"data.merge_prompts={merge}"]).config
        job = assemble(config, prepare_data(config))
        assert attach_reference(job) > 0
        known = job.loader.mismatched_values["reference"]
        for step in range(job.plans.total_steps):
            assert all((own, partner) in known for own, partner in job.plans.mismatched_pairs(step).tolist())
        job.engine.close()


def test_what_cannot_be_written_is_said(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(staged: Path, final: Path) -> Path:
        raise StorageError(f"{final}: cannot be written (No space left on device)")

    monkeypatch.setattr(cache, "publish", full)
    with pytest.raises(StorageError, match="No space left"):
        ask(index, Engine())


def test_one_rank_of_every_node_publishes(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is not the first, on a node where no job has the numbers yet: its own node's cache gets them."""
    ours = lambda *_: nullcontext(True)  # noqa: E731 - rank 0 has the turn, on another node
    monkeypatch.setattr(reference, "_turn", ours)
    engine = Engine()
    engine.rank = 3
    monkeypatch.setattr(dist, "local_rank", lambda: 1)
    ask(index, engine)
    assert cache.listing() == []
    monkeypatch.setattr(dist, "local_rank", lambda: 0)
    ask(index, engine)
    assert len(cache.listing()) == 1
