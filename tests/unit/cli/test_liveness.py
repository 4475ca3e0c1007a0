"""Who set a key, and whether the run read it: what does nothing is refused before training, or named once."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignlab import liveness, worker
from alignlab.cli import main
from alignlab.config import OptimConfig
from alignlab.configuration import groups, keys, schema
from alignlab.configuration.compose import compose
from alignlab.configuration.watch import plain, watched
from alignlab.errors import ConfigError
from alignlab.launching import launch, sweep
from alignlab.request import Request, make_request

BASE = ["model=tiny", "data=sums"]
DPO = [*BASE, "objective=dpo"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        liveness.gate(make_request("train", list(words)))
    return str(caught.value).split("\n")


def accepted(*words: str) -> Request:
    request = make_request("train", list(words))
    liveness.gate(request)
    return request


# --- objective and optim: stopped before training ------------------------------------------------------------------

IDLE = [
    (["objective=dpo", "objective.simpo_gamma=1"], "loss_type=sigmoid", "objective.loss_type=simpo"),
    (["objective=dpo", "objective.loss_type=hinge", "objective.label_smoothing=0.1"], "hinge", "loss_type=sigmoid"),
    (["objective=dpo", "objective.loss_type=simpo", "objective.reference_free=true"], "simpo", "loss_type=sigmoid"),
    (["objective=dpo", "objective.bco_running_mean=true"], "loss_type=sigmoid", "objective.loss_type=bco_pair"),
    (["objective=cpo", "objective.loss_type=ipo", "objective.label_smoothing=0.1"], "ipo", "loss_type=sigmoid"),
    (["objective=reward", "objective.absolute_weight=2"], "loss_type=bradley_terry", "objective.loss_type=eurus"),
    (["objective=reward", "objective.pair_weight=0"], "loss_type=bradley_terry", "objective.loss_type=eurus"),
    (["objective=ift", "objective.disturb_std=1"], "lambda_disturb=null", "objective.lambda_disturb=normal"),
    (["objective=ift", "objective.min_lambda=0.1"], "lambda_schedule=null", "objective.lambda_schedule=linear"),
    (["objective=ift", "objective.propagation=none", "objective.gamma=0.9"], "none", "propagation=product"),
    (["objective=ift", "objective.propagation=linear", "objective.propagation_norm=L2"], "linear", "=product"),
    (["objective=ift", "objective.max_lambda=0", "objective.residual=sample"], "max_lambda=0.0", "max_lambda=0.2"),
    (["objective=dpo", "optim=rmsprop", "optim.beta1=0.8"], "optim=rmsprop", "optim=adamw"),
    (["objective=dpo", "optim.alpha=0.9"], "optim=adamw", "optim=rmsprop"),
    (["objective=dpo", "optim=adamw_8bit", "optim.alpha=0.9"], "optim=adamw_8bit", "optim=rmsprop"),
    (["objective=dpo", "optim.warmup_steps=5", "optim.warmup_ratio=0.2"], "warmup_steps=5", "warmup_steps=null"),
    (["objective=sft", "optim.warmup_ratio=1", "optim.lr_scheduler_type=linear"], "ratio=1.0", "warmup_ratio=0.1"),
]


@pytest.mark.parametrize(("words", "now", "instead"), IDLE, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_a_knob_that_nothing_reads_is_refused_with_the_way_out(words: list[str], now: str, instead: str) -> None:
    (line,) = refused(*BASE, *words)
    key = words[-1].partition("=")[0]
    assert line.startswith(f"{key}: set on the command line, but nothing reads it with ")
    assert now in line
    assert instead in line


def test_all_of_them_are_said_together_and_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["objective.loss_type=ipo", "objective.label_smoothing=0.1", "optim.alpha=0.5", "objective.simpo_gamma=1"]
    for verb in ("train", "prepare", "probe"):
        assert main([verb, *DPO, *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(":")[1].strip() for line in lines] == [
            "objective.label_smoothing", "objective.simpo_gamma", "optim.alpha",
        ]  # fmt: skip
    assert os.listdir(".") == []


@pytest.mark.parametrize(
    "words",
    [
        [*DPO, "objective.beta=0.1", "optim.beta1=0.9", "optim.weight_decay=0.1", "optim.max_grad_norm=0"],
        [*DPO, "objective.loss_type=robust", "objective.label_smoothing=0.1"],
        [*DPO, "optim.warmup_steps=5", "optim.lr_scheduler_type=linear"],
        [*DPO, "optim.warmup_ratio=0.999", "optim.lr_scheduler_type=linear"],  # decays in a run that is long enough
        [*BASE, "objective=ift"],  # its file sets rmsprop and a warm-up
        [*BASE, "objective=ift", "optim=adamw"],  # the file's alpha is not the user's
        [*BASE, "objective=ift", "optim.warmup_steps=3"],  # its warmup_ratio neither
        [*BASE, "objective=ift", "objective.lambda_schedule=linear", "objective.min_lambda=0.1"],
        [*BASE, "objective=kto", "objective.desirable_weight=1.3"],
        [*BASE, "objective=reward", "objective.center_rewards_coefficient=0.1"],
        [*BASE, "objective=sft", "objective.unit=sequence"],
    ],
)
def test_what_is_read_is_accepted(words: list[str]) -> None:
    assert accepted(*words).reads >= {word.partition("=")[0] for word in words if word.count(".") and "null" not in word
                                      and word.startswith(("objective.", "optim."))}  # fmt: skip


def test_a_default_on_the_command_line_counts_unless_it_takes_something_back(tmp_path: Path) -> None:
    assert "optim.beta1" in refused(*DPO, "optim=rmsprop", "optim.beta1=0.9")[0]
    mine = tmp_path / "mine.yaml"
    mine.write_text("objective: {name: dpo, label_smoothing: 0.1}\nmodel: tiny\ndata: sums\n")
    (line,) = refused(str(mine), "objective.loss_type=ipo")
    assert line.startswith("objective.label_smoothing: set in mine.yaml, but nothing reads it with loss_type=ipo")
    accepted(str(mine), "objective.loss_type=ipo", "objective.label_smoothing=0")


def test_of_a_file_the_words_on_another_optimizer_do_not_count(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("objective: dpo\nmodel: tiny\ndata: sums\noptim: {name: rmsprop, alpha: 0.9}\n")
    accepted(str(mine))
    accepted(str(mine), "optim=adamw")


def test_recipes_answer_for_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(groups.conf_folder(), conf)
    (conf / "recipe" / "idle.yaml").write_text(
        "# @package _global_\n# A recipe.\nobjective:\n  loss_type: hinge\n  label_smoothing: 0.1\n"
    )
    caches = (groups.options, groups.option_values, groups._composed)
    monkeypatch.setattr(groups, "conf_folder", lambda: conf)
    try:
        for cached in caches:
            cached.cache_clear()
        (line,) = refused(*DPO, "recipe=idle")
        assert line.startswith("objective.label_smoothing: set in conf/recipe/idle.yaml, but nothing reads it")
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize("name", groups.options("recipe"))
def test_the_recipes_in_the_repository_read_all_their_keys(name: str) -> None:
    accepted(*DPO, f"recipe={name}")


# --- sweeps --------------------------------------------------------------------------------------------------------


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a sweep compose and pass the gate here; nothing trains."""

    def call(command: list[str], environment: dict[str, str], stdout: int | None = None) -> int:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return main(command[command.index("alignlab") + 1 :])

    def launched(request: Request) -> int:
        folder = launch.run_folder(request.config)
        folder.path.mkdir(parents=True)
        folder.write_status(state="done", exit_code=0)
        return 0

    monkeypatch.setattr(sweep, "call", call)
    monkeypatch.setattr("alignlab.verbs.train.launch", launched)


def test_a_sweep_does_not_die_of_a_knob_that_one_type_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    words = ["objective.loss_type=sigmoid,ipo", "objective.label_smoothing=0.1"]
    assert main(["train", "-m", *DPO, *words]) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 done" in out
    (line,) = err.splitlines()
    assert line.startswith("warning  objective.label_smoothing: ")
    assert "loss_type=ipo" in line
    assert line.endswith("(other points read it)")
    refused(*DPO, words[0].replace("sigmoid,", ""), words[1])  # alone the same point is


def test_a_knob_that_no_point_reads_stops_the_sweep_before_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    words = ["objective.loss_type=hinge,ipo", "objective.label_smoothing=0.1,0.2", "optim.alpha=0.5"]
    assert main(["train", "-m", *DPO, *words]) == 2
    out, err = capsys.readouterr()
    assert "point" not in out
    lines = err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["objective.label_smoothing", "optim.alpha"]
    assert all(line.endswith("(no point of the sweep reads it)") for line in lines)
    assert os.listdir(".") == []


# --- the whole run -------------------------------------------------------------------------------------------------

SMALL = [
    *BASE, "data.options={rows: 8, eval_rows: 2}", "train.max_steps=3", "train.global_batch_size=2", "engine=local",
    "launch=inline", "optim.warmup_ratio=0.3",
]  # fmt: skip


@pytest.fixture
def reads_of_workers(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The keys that workers read, a set for each that ran in this process."""
    found: list[set[str]] = []

    def recording(config: Any, reads: set[str]) -> Any:
        found.append(reads)
        return watched(config, reads)

    monkeypatch.setattr(worker, "watched", recording)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["objective=dpo", "objective.loss_type=[hinge,sft]", "optim=adamw"],
        ["objective=ift", "objective.lambda_schedule=linear", "objective.min_lambda=0.1"],
        ["objective=kto"],
    ],
    ids=lambda words: words[0],
)
def test_a_training_reads_what_the_dry_pass_says(words: list[str], reads_of_workers: list[set[str]]) -> None:
    config = compose([*SMALL, *words]).config
    said = liveness.read_in_training(config.objective, config.optim)
    assert said is not None
    assert main(["train", *SMALL, *words]) == 0
    read = {key for key in reads_of_workers[0] if key.startswith(("objective.", "optim."))}
    assert read == said


def test_the_run_folder_and_show_say_who_set_a_key_and_whether_it_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "objective=dpo", "run.name=told", "eval.temperature=0.5", "launch.time=1:00:00",
             "train.save_steps=2", "optim.lr_scheduler_type=linear"]  # fmt: skip
    assert main(["train", *words]) == 0
    screen = capsys.readouterr().out
    (line,) = [line for line in screen.splitlines() if line.startswith("warning")]
    assert line == (
        "warning  set but not read, so without effect on this run: "
        "eval.temperature (command line), launch.time (command line)"
    )
    assert line.removeprefix("warning  ") in Path("runs/told/log.txt").read_text()

    found = json.loads(Path("runs/told/keys.json").read_text())
    assert set(found) == set(schema.flatten(compose(words).config))
    assert found["train.save_steps"] == {"value": 2, "set_by": "command line", "stated": True, "read": True}
    assert found["objective.beta"]["set_by"] == "conf/objective/dpo.yaml"
    assert {key: found[key]["read"] for key in (
        "model.name_or_path", "data.options", "seed", "output_dir", "launch.nproc", "train.token_budget", "optim.beta1",
        "objective.beta", "optim.alpha", "objective.simpo_gamma", "launch.time", "peft.lora_r", "eval.temperature",
    )} == {
        "model.name_or_path": True, "data.options": True, "seed": True, "output_dir": True, "launch.nproc": False,
        "train.token_budget": True, "optim.beta1": True, "objective.beta": True, "optim.alpha": False,
        "objective.simpo_gamma": False, "launch.time": False, "peft.lora_r": False, "eval.temperature": False,
    }  # fmt: skip

    assert main(["show", "runs/told"]) == 0
    shown = capsys.readouterr().out
    assert "  beta: 0.1                                   # conf/objective/dpo.yaml, read\n" in shown
    assert '  time: "1:00:00"                             # command line, not read\n' in shown
    Path("again.yaml").write_text(shown)
    assert compose(file=Path("again.yaml")).config == compose(file=Path("runs/told/run.yaml")).config
    assert main(["show", "runs/told", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["read"]["optim.beta1"] is True
    assert answer["read"]["launch.time"] is False
    assert answer["provenance"]["optim.lr_scheduler_type"] == "command line"
    assert answer["provenance"]["optim.beta1"] == "default"

    # A run that is taken up again keeps who set what.
    status = json.loads(Path("runs/told/status.json").read_text())
    Path("runs/told/status.json").write_text(json.dumps({**status, "state": "preempted"}))
    assert main(["train", "runs/told"]) == 0
    assert json.loads(Path("runs/told/keys.json").read_text())["train.save_steps"]["set_by"] == "command line"
    assert "save_steps: 2                               # command line" in Path("runs/told/run.yaml").read_text()


def test_what_the_user_set_and_nothing_read_is_one_line() -> None:
    values = {"a": 1, "b": 2, "c": 3, "overwrite": True}
    found = keys.record(values, {"a": "mine.yaml", "b": "command line", "c": "x.yaml"}, {"a", "b", "overwrite"}, {"b"})
    assert keys.warning(found) == "set but not read, so without effect on this run: a (mine.yaml)"
    assert keys.warning(keys.record(values, {}, {"a"}, {"a"})) is None
    later = keys.record({**values, "b": 5}, {}, {"a", "b"}, set(), found)
    assert [key for key, entry in later.items() if entry["read"]] == []  # b has another value than the one read
    assert keys.record(values, {}, {"b"}, set(), found)["b"]["read"]


def test_a_runs_own_file_is_not_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen as a sweep's point with a knob that only others read; sbatch's job starts from it."""
    made = compose([*DPO, "objective.loss_type=ipo", "objective.label_smoothing=0.1", "run.name=x"])
    from alignlab.configuration.frozen import frozen_text

    (tmp_path / "run.yaml").write_text(frozen_text(made.config, made.provenance))
    accepted(str(tmp_path / "run.yaml"), "launch=slurm")
    assert "objective.label_smoothing" in capsys.readouterr().err
    assert len(refused(str(tmp_path / "run.yaml"), "objective.loss_type=hinge")) == 1
    stated = compose(file=tmp_path / "run.yaml").stated
    assert "objective.label_smoothing" in stated
    assert not {"optim.beta1", "objective.simpo_gamma", "optim.alpha"} & stated


def test_an_objective_from_outside_that_cannot_run_on_random_rows_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from alignlab.objectives.base import BaseObjective\n"
        "from alignlab.registry import register_objective\n"
        "@dataclass\nclass Config:\n    scale: float = 1.0\n    idle: float = 1.0\n"
        "@register_objective('needs_its_own_rows')\nclass Mine(BaseObjective):\n    Config = Config\n"
        "    def __call__(self, score, batch, context):\n        return batch.sequence_values['its own']\n"
    )
    words = [*BASE, "plugins=[./mine.py]", "objective=needs_its_own_rows", "objective.idle=2"]
    assert accepted(*words).reads == set()


# --- watching ------------------------------------------------------------------------------------------------------


def test_watching_notes_single_reads_and_no_wholesale_ones() -> None:
    config = compose(DPO).config
    reads: set[str] = set()
    seen = watched(config, reads)
    assert schema.flatten(seen) == schema.flatten(config)
    assert dataclasses.asdict(seen.optim) == dataclasses.asdict(config.optim)
    assert seen == config
    assert config == seen
    assert config.optim == seen.optim
    assert repr(seen.optim) == repr(config.optim)
    other = dataclasses.replace(seen, optim=dataclasses.replace(seen.optim, beta1=0.5), seed=3)
    beta = dataclasses.replace(seen.objective, beta=0.5)  # its __post_init__ looks at every field
    assert vars(seen.optim)["eps"] == 1e-8
    assert pickle.loads(pickle.dumps(seen.optim)) == config.optim
    assert type(pickle.loads(pickle.dumps(seen.optim))) is OptimConfig
    assert type(plain(seen).optim) is OptimConfig
    assert reads == set()
    assert other.optim.beta1 == 0.5
    assert beta.beta == 0.5
    assert copy.deepcopy(seen).seed == 0
    assert copy.copy(seen.model).dtype == "auto"
    assert getattr(seen.data.condition, "drop") == 0  # noqa: B009
    assert isinstance(seen.optim, OptimConfig)
    assert reads == {"optim.beta1", "objective.beta", "seed", "model.dtype", "data.condition.drop"}


@dataclasses.dataclass(frozen=True)
class Frozen:
    one: int = 1
    two: int = 2


def test_frozen_dataclasses_are_watched_too() -> None:
    reads: set[str] = set()
    seen = watched(Frozen(), reads, "objective.")
    assert hash(seen) == hash(Frozen())
    assert (seen.two, reads) == (2, {"objective.two"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.one = 3  # type: ignore[misc]
