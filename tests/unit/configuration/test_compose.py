"""Composition: groups, the user's values, who set what, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from alignlab.config import RootConfig
from alignlab.configuration import schema, suggest
from alignlab.configuration.compose import Composed, compose
from alignlab.configuration.frozen import frozen_text, load_frozen
from alignlab.configuration.groups import conf_folder, options
from alignlab.configuration.settings import GROUPS
from alignlab.errors import ConfigError
from alignlab.registry import OBJECTIVES
from alignlab.verb_table import ALL

BASE = ["objective=dpo", "model=tiny", "data=sums"]


def problems(*tokens: str, **arguments: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, *tokens], **arguments)  # type: ignore[arg-type]
    return str(caught.value).split("\n")


def test_the_groups_on_disk_are_the_promised_ones() -> None:
    folders = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    assert folders == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_composes(group: str) -> None:
    assert options(group)
    for option in options(group):
        made = compose([*BASE, f"{group}={option}"], needs=ALL)
        assert made.options[group] == option
        text = (conf_folder() / group / f"{option}.yaml").read_text()
        assert text.startswith("# "), f"{group}/{option}.yaml says nothing about itself"


def test_each_objective_gets_its_own_section_type() -> None:
    for name in OBJECTIVES.names():
        config = compose([f"objective={name}", "model=tiny", "data=sums"]).config
        assert isinstance(config.objective, OBJECTIVES.get(name).Config)
        assert config.objective.name == name
        assert OBJECTIVES.get(name)(config.objective).name == name


def test_objective_files_state_the_defaults_of_their_dataclass() -> None:
    for name in OBJECTIVES.names():
        config = compose([f"objective={name}", "model=tiny", "data=sums"]).config
        assert config.objective == schema.objective_config(name)()


def test_objectives_bring_their_learning_rate_and_the_user_wins() -> None:
    made = compose(["objective=ift", "model=tiny", "data=sums"])
    assert (made.config.optim.name, made.config.optim.learning_rate) == ("rmsprop", 5e-7)
    assert made.provenance["optim.learning_rate"] == "conf/objective/ift.yaml"
    assert made.provenance["optim.weight_decay"] == "default"
    made = compose(["objective=ift", "model=tiny", "data=sums", "optim=adamw", "optim.learning_rate=3e-4"])
    assert (made.config.optim.name, made.config.optim.learning_rate) == ("adamw", 3e-4)
    assert made.provenance["optim.learning_rate"] == made.provenance["optim.name"] == "command line"


def test_provenance_covers_every_key_and_matches_the_files() -> None:
    made = compose([*BASE, "debug=overfit", "logger=wandb", "peft=lora"])
    assert set(made.provenance) == set(schema.flatten(made.config))
    assert made.provenance["train.max_steps"] == "conf/debug/overfit.yaml"
    assert made.provenance["train.num_train_epochs"] == "conf/train/default.yaml"
    assert made.provenance["logger.names"] == "command line" or made.provenance["logger.names"].endswith("wandb.yaml")
    assert made.config.logger.names == ["jsonl", "wandb"]


def test_needs_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([], needs=ALL)
    lines = str(caught.value).split("\n")
    assert [line.split()[0] for line in lines] == ["model", "data", "objective"]
    assert compose(["objective=sft"]).config.model.name_or_path == schema.REQUIRED


# --- values ------------------------------------------------------------------------------------------------------

PATHS = [
    "a=b.jsonl", "a#b.jsonl", "two words.jsonl", "with (parentheses).jsonl", "it's.jsonl", "~tilde.jsonl", "a~b.jsonl",
    "ünï-日本.jsonl", "comma,comma.jsonl", "{braces}.jsonl", "[brackets].jsonl", "$dollar ${x}.jsonl",
    "back\\slash.jsonl", 'quo"te.jsonl', "range(1,3).jsonl", "true", "null.jsonl", "1e5",
    "a: b.jsonl", "-dash.jsonl", "%.jsonl", "@at.jsonl",
    "new\nline.jsonl", "'.jsonl", "?.jsonl", "*.jsonl", "a;b.jsonl", "tab\t.jsonl", "+plus.jsonl", "é.jsonl",
    "...jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_any_path_works_unquoted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("{}\n")
    for tokens in ([f"data={name}"], [f"data.path={name}"], [f"data={tmp_path}/{name}"]):
        config = compose(["objective=dpo", "model=tiny", *tokens]).config
        assert Path(config.data.path or "").samefile(tmp_path / name)
        assert config.data.eval_path is None
    assert compose([*BASE, f"model={name}"]).config.model.name_or_path == name
    (tmp_path / "f.yaml").write_text("x")
    made = compose(["objective=dpo", "model=tiny", f"data={name}"])
    (tmp_path / "run.yaml").write_text(frozen_text(made.config, made.provenance))
    assert compose(file=tmp_path / "run.yaml").config == made.config


def test_home_is_expanded_only_where_it_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text("")
    assert compose([*BASE, "data=~/x.jsonl"]).config.data.path == str(tmp_path / "x.jsonl")


def test_structured_values() -> None:
    config = compose([
        "objective=dpo", "model=Qwen/Qwen3-8B", "objective.loss_type=[sigmoid,sft]", "objective.loss_weights=[1,0.5]",
        "data.columns={prompt: question}", "data.columns.completion=answer", "data.options.rows=20",
        "data.sources=[{path: a, weight: 0.5},{path:b,split:test}]", "logger=[jsonl,tensorboard]",
        "train.max_steps=null", "data.max_length=512", "launch.nproc=2", "data.merge_prompts=true", "seed=1e3",
        "launch.extra=[--constraint=h100]", "optim.learning_rate=1", "reference=Qwen/Qwen3-0.6B",
    ]).config  # fmt: skip
    assert config.objective.loss_type == ["sigmoid", "sft"]
    assert config.objective.loss_weights == [1.0, 0.5]
    assert config.data.columns == {"prompt": "question", "completion": "answer"}
    assert config.data.options == {"rows": 20}
    assert [(s.path, s.weight, s.split) for s in config.data.sources] == [("a", 0.5, "train"), ("b", 1.0, "test")]
    assert config.logger.names == ["jsonl", "tensorboard"]
    assert (config.data.max_length, config.launch.nproc, config.data.merge_prompts) == ("512", "2", "true")
    assert (config.seed, config.train.max_steps, config.optim.learning_rate) == (1000, None, 1.0)
    assert config.launch.extra == ["--constraint=h100"]
    assert config.reference.name_or_path == "Qwen/Qwen3-0.6B"
    assert compose([*BASE, "reference=true"]).config.reference.compute is True


def test_values_out_of_range_or_of_no_option() -> None:
    for token, word in (
        ("train.global_batch_size=0", "more than 0"),
        ("optim.warmup_ratio=1.5", "between 0 and 1"),
        ("model.dtype=float32", "fp32"),
        ("data.overlong=truncate", "drop, cut, error"),
        ("optim.lr_scheduler_type=cosin", "did you mean cosine"),
        ("logger=[jsonl,wanbd]", "did you mean wandb"),
        ("logger=jsonl,wandb", "jsonl"),
        ("objective.beta=0", "objective.beta"),
        ("objective.loss_type=sigmoidd", "sigmoidd"),
        ("engine=zero4", "zero3"),
        ("optim.name=adam", "adamw"),
        ("peft=lorra", "lora"),
        ("launch.nproc=two", "auto or a whole number"),
        ("data.max_length=0", "auto or a whole number"),
        ("data=missing.jsonl", "no such file"),
        ("model=./missing", "no such file"),
        ("resume=nowhere", "resume"),
        ("train.gradient_checkpointing=yes", "true or false"),
    ):
        text = "\n".join(problems(token))
        assert word in text, text


def test_rules_between_keys() -> None:
    for tokens, word in (
        (("engine=local", "launch.nproc=2"), "engine=local is one process"),
        (("model.dtype=fp64", "engine=zero2"), "fp64"),
        (("data.sources=[{path: a}]",), "give one of them"),
        (("engine.offload_optimizer=true",), "zero1"),
        (("launch.nnodes=2",), "launch=slurm"),
    ):
        assert word in "\n".join(problems(*tokens))


def test_all_problems_are_reported_together() -> None:
    found = problems("optim.lr=1", "train.max_steps=x", "engine=zero9", "seeed=1", "data.limit=-2")
    assert len(found) == 5
    assert not any("Traceback" in line for line in found)


# --- unknown keys --------------------------------------------------------------------------------------------------


def test_names_of_other_programs_are_pointed_out_and_never_accepted() -> None:
    known = schema.schema("dpo")
    for alias, ours in suggest.ALIASES.items():
        if alias in GROUPS or alias in known:
            continue
        assert ours in known or ours in GROUPS, f"{alias} points to {ours}, which does not exist"
        (line,) = problems(f"{alias}=1")
        assert f"did you mean {ours}?" in line, line
    for key, where in (("learning_rate", "optim.learning_rate"), ("beta", "objective.beta")):
        assert where in problems(f"{key}=1")[0]
    assert "train.per_device_train_batch_size" in problems("per_device_train_batch_size=1")[0]


def test_keys_of_another_objective_and_hints() -> None:
    assert "objective=ift" in problems("objective.max_lambda=1")[0]
    with pytest.raises(ConfigError, match="contrastive"):
        compose(["objective=cpo", "model=tiny", "data=sums", "objective.cpo_alpha=1"])


@pytest.mark.parametrize(
    "token",
    [
        "++model.extra=1", "+seed=1", "~model.dtype", "~seed=1", "hydra.run.dir=x", "hydra/launcher=x",
        "model._target_=os.system",
        "_target_=os.system", "data.options={_target_: os.system}",
        "data.options={a: {_target_: pathlib.Path}}",
        "data.sources=[{path: a, _target_: x}]", "model@x=tiny", "data.options._target_=os.system",
        "optim._partial_=true",
        "hydra.searchpath=[file:///x]", "paths.dir=x", "model.kwargs={a: 1}", "--beta=1", "--learning_rate", "optim",
    ],
)  # fmt: skip
def test_nothing_can_be_smuggled_in(token: str) -> None:
    assert problems(token)


def test_interpolation_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "secret")
    config = compose([*BASE, "logger.project=${oc.env:CANARY}"]).config
    assert config.logger.project == "${oc.env:CANARY}"


SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyz", "sk-abcdefghijklmnopqrstuv", "ghp_abcdefghijklmnopqrstuvwxyz0123",
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "https://user:password@host/x", "xoxb-12345678901-abcdef",
    "glpat-abcdefghijklmnopqrst", "sk-proj-abcdefghijklmnop_qrst",
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_refused_and_not_repeated(secret: str, tmp_path: Path) -> None:
    lines = problems(f"logger.project={secret}")
    assert "environment" in lines[0]
    assert secret not in "\n".join(lines)
    assert secret not in "\n".join(problems(f"--token={secret}"))
    file = tmp_path / "f.yaml"
    file.write_text(f"data: {{options: {{token: '{secret}'}}}}\n")
    with pytest.raises(ConfigError) as caught:
        compose(file=file)
    assert secret not in str(caught.value)


# --- files ---------------------------------------------------------------------------------------------------------


def from_file(text: str, tmp_path: Path, *tokens: str) -> Composed:
    path = tmp_path / "my file=1.yaml"
    path.write_text(text)
    return compose(tokens, file=path)


def test_flat_and_nested_files_are_the_same(tmp_path: Path) -> None:
    flat = from_file(
        "objective: dpo\nmodel: tiny\ndata: sums\noptim.learning_rate: 1e-5\nobjective.beta: 0.2\n"
        "data.columns: {prompt: q}\ntrain.max_steps: 3\n",
        tmp_path,
    )
    nested = from_file(
        "objective: {name: dpo, beta: 0.2}\nmodel: {name_or_path: tiny}\n"
        "data: {path: sums, eval_path: sums, columns: {prompt: q}}\n"
        "optim:\n  learning_rate: 1e-5\ntrain:\n  max_steps: 3\n",
        tmp_path,
    )
    assert flat.config == nested.config
    assert flat.config.optim.learning_rate == 1e-5
    assert flat.provenance["optim.learning_rate"] == "my file=1.yaml"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    text = "objective: {name: dpo, beta: 0.2}\nmodel: tiny\ndata: sums\noptim: {name: adamw, learning_rate: 1e-5}\n"
    made = from_file(text, tmp_path, "optim.learning_rate=2e-5", "optim=rmsprop", "model=Qwen/Qwen3-0.6B")
    assert (made.config.optim.name, made.config.optim.learning_rate) == ("rmsprop", 2e-5)
    assert made.config.model.name_or_path == "Qwen/Qwen3-0.6B"
    other = from_file(text, tmp_path, "objective=sft", "data=rows")
    assert other.config.objective == schema.objective_config("sft")()
    assert (other.config.data.path, other.config.data.eval_path) == ("rows", None)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_the_frozen_file_gives_the_configuration_back(objective: str, tmp_path: Path) -> None:
    made = compose([
        f"objective={objective}", "model=a b", "data={x}: y #1", "peft=lora", "launch=torchrun", "logger=[wandb]",
        "run.name=here", "data.columns={a b: 'c: d'}", "data.condition.buckets=[{condition: {help: 5}, max_count: 2}]",
        "data.options={name: 'true', rows: 3, share: 1e-3}", "optim.eps=1e-12", "launch.extra=[\"--x='1 2'\"]",
    ])  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(frozen_text(made.config, made.provenance))
    again = compose(file=path)
    assert again.config == made.config
    assert load_frozen(tmp_path) == made.config
    assert frozen_text(again.config, {}) == frozen_text(made.config, {})
    assert "# command line" in path.read_text()


def test_a_runs_own_file_with_other_numbers_is_another_run(tmp_path: Path) -> None:
    from alignlab.configuration.names import run_name

    made = compose(BASE)
    name = run_name(made.config)
    config = dataclasses.replace(made.config, run=dataclasses.replace(made.config.run, name=name))
    path = tmp_path / "run.yaml"
    path.write_text(frozen_text(config, made.provenance))
    assert run_name(compose(file=path).config) == name
    assert run_name(compose(["train.save_steps=5", "engine=zero2"], file=path).config) == name
    other = run_name(compose(["objective.beta=0.3"], file=path).config)
    assert other != name
    assert other == run_name(compose([*BASE, "objective.beta=0.3"]).config)
    named = config.run.__class__("mine")
    path.write_text(frozen_text(dataclasses.replace(config, run=named), made.provenance))
    assert run_name(compose(["objective.beta=0.3"], file=path).config) == "mine"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("seed: [1\n", "not valid YAML"),
        ("- 1\n", "keys and values"),
        ("seed: " + "[" * 50 + "]" * 50, "nested"),
        ("x: '" + "a" * 300_000 + "'", "larger"),
        ("? [a]\n: 1\n", "plain text"),
        ("sed: 1\n", "did you mean seed"),
        ("hydra: {run: {dir: x}}\n", "Hydra"),
        ("model: {_target_: os.system}\n", "import path"),
        ("optim: {learning_rate: .nan}\n", "finite"),
        ("seed: 2020-01-01\n", "whole number"),
        ("train: {max_steps: yes}\n", "whole number"),
    ],
)
def test_files_that_are_refused(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        from_file(text, tmp_path)


def test_every_key_has_a_type_that_round_trips() -> None:
    flat = schema.flatten(compose(BASE).config)
    assert schema.build(RootConfig, compose(BASE).config and _typed(flat), "dpo") == compose(BASE).config


def _typed(flat: dict[str, object]) -> dict[str, object]:
    known = schema.schema("dpo")
    return {key: schema.coerce(value, known[key].type) for key, value in flat.items()}


def test_nothing_of_the_environment_enters() -> None:
    before = compose(BASE).config
    os.environ["HYDRA_FULL_ERROR"] = "0"
    assert compose(BASE).config == before


def test_a_runs_own_file_means_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, run, other = tmp_path / "start", tmp_path / "start/runs/x", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir(parents=True)
    for name in ("rows.jsonl", "held.jsonl"):
        (start / name).write_text("{}\n")
    text = {
        "model.name_or_path": "tiny", "objective": "sft", "data.sources": [{"path": "rows.jsonl", "weight": 2.0}],
        "data.eval_path": "held.jsonl", "output_dir": "runs",
    }  # fmt: skip
    (run / "run.yaml").write_text(json.dumps(text))
    (run / "env.json").write_text(json.dumps({"folder": str(start)}))
    monkeypatch.chdir(other)
    config = compose(file=run / "run.yaml").config
    assert config.data.sources[0].path == str(start / "rows.jsonl")
    assert (config.data.eval_path, config.output_dir) == (str(start / "held.jsonl"), str(start / "runs"))
    assert config.model.name_or_path == "tiny"
    assert compose(["output_dir=here"], file=run / "run.yaml").config.output_dir == "here"
    monkeypatch.chdir(start)
    assert compose(file=run / "run.yaml").config.output_dir == "runs"


def test_a_misspelt_key_of_the_verb_s_own_is_recognised() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'lint\.ngrams': did you mean lint\.ngram\?"):
        compose(["lint.ngrams=3"], own=("lint", "lint.ngram"))


def test_a_source_of_a_mixture_may_be_a_named_one() -> None:
    """What the option's file says holds, under the entry's own words."""
    made = compose(
        ["objective=sft", "model=tiny", "data.sources=[{path: ultrachat, weight: 0.5}, {path: gsm8k, split: test}]"]
    )
    chat, sums = made.config.data.sources
    assert (chat.path, chat.split, chat.weight) == ("HuggingFaceH4/ultrachat_200k", "train_sft", 0.5)
    assert chat.format == "messages"
    assert (sums.path, sums.split, sums.format) == ("openai/gsm8k:main", "test", "questions")
    with pytest.raises(ConfigError, match=r"data\.sources: .*cpo is a mixture itself; choose it with data=cpo"):
        compose(["objective=sft", "model=tiny", "data.sources=[{path: cpo}]"])
