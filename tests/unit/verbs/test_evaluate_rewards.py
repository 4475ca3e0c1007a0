"""``evaluate rm=``: table and JSON of reward models, our own and foreign ones, against transformers' own forward."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from alignlab.errors import StorageError
from alignlab.rewards.compare import mcnemar
from alignlab.rewards.intervals import wilson

Run = Callable[..., Any]
SUBSETS = ("hep-go", "math-prm", "llmbar-natural", "donotanswer", "alpacaeval-easy")
REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def bench_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows as RewardBench has them: text, a subset, an id that is a number."""
    rng = np.random.default_rng(seed)
    words = ["sum", "of", "one", "two", "no", "yes", "seven", "what", "is", "go"]

    def text(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(2, most)))

    return [
        {"prompt": f"{text(6)} {seed}-{i}", "chosen": text(9), "chosen_model": "x", "rejected": f"{text(9)} no {i}",
         "rejected_model": "y", "subset": SUBSETS[i % len(SUBSETS)], "id": i}
        for i in range(count)
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@cache
def loaded(folder: str) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()


def oracle(folder: str | Path, prompt: str, answers: list[str]) -> list[float]:
    """What transformers gives for each answer alone, through the folder's own template."""
    tokenizer, model = loaded(str(folder))
    found = []
    for answer in answers:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.item())
    return found


@pytest.fixture
def trained(run: Run, home: Path, small_model: Path) -> Path:
    """A reward model of three steps, trained once for the module, evaluated on held-out rows with subsets."""
    folder = home / "runs" / "rm"
    if not folder.exists():
        data, held = write(home / "train.jsonl", bench_rows(12, 0)), write(home / "held.jsonl", bench_rows(25, 1))
        answer = run(
            "train", f"model={small_model}", "objective=reward", f"data={data}", f"data.eval_path={held}",
            "engine=local", "train.max_steps=3", "train.eval_steps=2", "train.global_batch_size=4",
            "optim.learning_rate=1e-2", "run.name=rm",
        )  # fmt: skip
        assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def foreign(home: Path, small_model: Path) -> Path:
    """A reward model that nobody here has trained: random weights, one label, a tokenizer beside it."""
    folder = home / "foreign"
    if not folder.exists():
        config = AutoConfig.from_pretrained(small_model, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(small_model)
        config.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rewards_by_hand(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([oracle(folder, row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])


@pytest.mark.parametrize("which", ["trained", "foreign"])
def test_figures_are_those_of_transformers_own_forward(
    run: Run, home: Path, which: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    rows = bench_rows(25, 1)
    data = write(home / "held.jsonl", rows)
    found = run("evaluate", f"rm={folder}", f"data={data}", "resamples=500", "--json").json
    both = rewards_by_hand(folder / "model" if which == "trained" else folder, rows)
    right = both[:, 0] > both[:, 1]
    assert found["pairs"] == found["prompts"] == 25
    assert found["accuracy"]["value"] == pytest.approx(right.mean())
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == wilson(right.sum(), 25)
    assert found["margin"] == pytest.approx((both[:, 0] - both[:, 1]).mean(), abs=1e-5)
    by_subset = {name: right[[row["subset"] == name for row in rows]].mean() for name in SUBSETS}
    assert {name: one["accuracy"]["value"] for name, one in found["categories"].items()} == pytest.approx(by_subset)
    bench = found["benchmark"]
    reasoning = (984 * by_subset["math-prm"] + 164 * by_subset["hep-go"]) / 1148
    assert bench["sections"]["Reasoning"]["value"] == pytest.approx(reasoning)
    rest = by_subset["llmbar-natural"] + by_subset["donotanswer"] + by_subset["alpacaeval-easy"]
    assert bench["overall"]["value"] == pytest.approx((reasoning + rest) / 4)
    assert found["signs"]["mean_chosen"] == pytest.approx(both[:, 0].mean(), abs=1e-5)
    assert found["layout"] == "tree"  # the prompt once for both answers
    assert found["batch_invariance"]["sequences"] == 32
    assert found["batch_invariance"]["largest"] < 1e-5


def test_a_runs_figures_stand_in_its_folder(run: Run, home: Path, trained: Path) -> None:
    data = write(home / "held.jsonl", bench_rows(25, 1))
    answer = run("evaluate", f"rm={trained}", f"data={data}", "resamples=500")
    assert answer.code == 0
    (written,) = trained.glob("eval/held-rm-*.json")
    figures = json.loads(written.read_text())
    assert figures["model"] == str(trained / "model")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"written  {written}" in answer.out
    for name in (*SUBSETS, "all"):
        assert any(line.startswith(f"{name} ") for line in answer.out.splitlines())
    chat = figures["benchmark"]["sections"]["Chat"]["value"]
    assert f"RewardBench   25 of 2,985 rows\n  Chat             {chat:.3f} [" in answer.out
    again = run("evaluate", f"rm={trained / 'model'}", f"data={data}", "resamples=500", "--json").json
    assert again == figures


def test_training_says_the_same_by_category(run: Run, home: Path, trained: Path) -> None:
    """Before the first, at the second and after the last step; the last one is what ``evaluate`` finds."""
    data = write(home / "held.jsonl", bench_rows(25, 1))
    found = run("evaluate", f"rm={trained}", f"data={data}", "--json").json
    steps = {step: json.loads((trained / "eval" / f"step-{step}.json").read_text()) for step in (0, 2, 3)}
    for said in steps.values():
        assert {f"eval_accuracy/{name}" for name in SUBSETS} <= set(said)
        mean = np.mean([said[f"eval_accuracy/{name}"] for name in SUBSETS])
        assert said["eval_accuracy"] == pytest.approx(mean)  # five rows in each
        assert said["eval_accuracy_low"] < said["eval_accuracy"] < said["eval_accuracy_high"]
    last = steps[3]
    without_rm = run("evaluate", str(trained), "--json").json["metrics"]
    assert {name: without_rm[name] for name in last} == pytest.approx(last)
    for name in SUBSETS:
        assert last[f"eval_accuracy/{name}"] == found["categories"][name]["accuracy"]["value"]
    assert (last["eval_accuracy_low"], last["eval_accuracy_high"]) == (
        found["accuracy"]["low"], found["accuracy"]["high"],
    )  # fmt: skip
    assert last["eval_loss"] == pytest.approx(found["calibration"]["log_loss"], abs=1e-6)


def test_best_of_four(run: Run, home: Path, foreign: Path) -> None:
    rows = []
    for row in bench_rows(12, 5):
        wrong = [row["rejected"], f"{row['rejected']} what", f"yes {row['rejected']}"]
        rows.append({"prompt": row["prompt"], "chosen": [row["chosen"]], "rejected": wrong, "num_correct": 1,
                     "subset": ("Math", "Focus")[row["id"] % 2], "id": str(row["id"])})  # fmt: skip
    data = write(home / "two.jsonl", rows)
    bench = run("evaluate", f"rm={foreign}", f"data={data}", "resamples=500", "--json").json["benchmark"]
    assert bench["name"] == "RewardBench 2"
    best = [np.argmax(oracle(foreign, row["prompt"], [*row["chosen"], *row["rejected"]])) == 0 for row in rows]
    for name in ("Math", "Focus"):
        wanted = np.mean([hit for hit, row in zip(best, rows, strict=True) if row["subset"] == name])
        assert bench["sections"][name]["value"] == pytest.approx(wanted)
    assert bench["rows"] == 12


def test_rated_answers_are_pools(run: Run, home: Path, foreign: Path) -> None:
    """Three answers of known quality to each prompt: the best by the model, at random, the best there is."""
    rows = []
    for number, row in enumerate(bench_rows(6, 7)):
        said = [row["chosen"], row["rejected"], f"seven {row['chosen']}"]
        scores = [{"score": (place + number) % 3} for place in range(3)]
        rows.append({"instruction": row["prompt"], "source": "made",
                     "completions": [{"response": s, **q} for s, q in zip(said, scores, strict=True)]})  # fmt: skip
    found = run(
        "evaluate", f"rm={foreign}", f"data={write(home / 'rated.jsonl', rows)}", "resamples=500", "--json"
    ).json
    assert found["pairs"] == 18
    assert list(found["categories"]) == ["made"]
    two, whole = found["best_of_n"]
    picked = []
    for row in rows:
        rewards = oracle(foreign, row["instruction"], [one["response"] for one in row["completions"]])
        picked.append(row["completions"][int(np.argmax(rewards))]["score"])
    assert whole["model"] == pytest.approx(np.mean(picked))
    assert (whole["random"], whole["oracle"], whole["pools"]) == (pytest.approx(1.0), 2.0, 6)
    assert two["oracle"] == pytest.approx(5 / 3)  # {0,1} -> 1, {0,2} -> 2, {1,2} -> 2
    assert whole["regret"]["value"] == pytest.approx(2 - np.mean(picked))


def test_two_models_on_the_same_rows(run: Run, home: Path, trained: Path, foreign: Path) -> None:
    rows = bench_rows(25, 1)
    data = write(home / "held.jsonl", rows)
    plot = home / "plots" / "two.png"
    command = ("evaluate", f"data={data}", "resamples=500", "alone=0")
    told = home / "plots" / "pairs.jsonl"
    found = run(*command, f"rm=[{trained},{foreign}]", f"plot={plot}", f"rewards={told}", "--json").json
    mine, theirs = (rewards_by_hand(folder, rows) for folder in (trained / "model", foreign))
    first, second = mine[:, 0] > mine[:, 1], theirs[:, 0] > theirs[:, 1]
    said = found["comparison"]
    assert said["difference"]["value"] == pytest.approx(first.mean() - second.mean())
    assert (said["only_first_right"], said["only_second_right"]) == ((first & ~second).sum(), (second & ~first).sum())
    assert said["p"] == mcnemar(said["only_first_right"], said["only_second_right"])
    assert (said["pairs"], said["left_out"]) == (25, 0)
    assert found["against"]["accuracy"]["value"] == pytest.approx(second.mean())
    assert found["batch_invariance"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [line["model"] for line in lines] == [str(trained / "model")] * 25 + [str(foreign)] * 25
    both = np.array([[line["reward_chosen"], line["reward_rejected"]] for line in lines])
    np.testing.assert_allclose(both, np.concatenate((mine, theirs)), atol=1e-5)
    assert [line["id"] for line in lines[:25]] == [str(row["id"]) for row in rows]
    assert [line["category"] for line in lines[:25]] == [row["subset"] for row in rows]
    longer = np.array([np.sign(line["tokens_chosen"] - line["tokens_rejected"]) / 2 + 0.5 for line in lines[:25]])
    assert found["over_longer"]["value"] == pytest.approx((first - longer).mean())
    again = run(*command, f"rm={trained}", f"against={foreign}")
    assert f"McNemar  only the first right {said['only_first_right']}" in again.out


def test_rows_that_one_model_lost_are_compared_by_neither(
    run: Run, home: Path, foreign: Path, small_model: Path
) -> None:
    """The second model has 64 positions: one row has a long answer among its pairs, one is too long altogether."""
    short = home / "short"
    if not short.exists():
        config = AutoConfig.from_pretrained(foreign, max_position_embeddings=64)
        torch.manual_seed(4)
        LlamaForSequenceClassification(config).save_pretrained(short)
        AutoTokenizer.from_pretrained(small_model).save_pretrained(short)
    rows = [
        {"prompt": row["prompt"], "chosen": [row["chosen"]], "rejected": [row["rejected"], "no"], "subset": "mine"}
        for row in bench_rows(4, 3)
    ]
    rows[1]["rejected"][1] = "so " * 60
    rows[2]["prompt"] = "what " * 80
    found = run(
        "evaluate", f"rm={foreign}", f"against={short}", f"data={write(home / 'long.jsonl', rows)}", "--json"
    ).json
    assert (found["pairs"], found["against"]["pairs"]) == (8, 5)
    assert found["against"]["rows"]["dropped"] == {"overlong": 1}
    assert found["against"]["rows"]["parts"] == {"overlong": 1}
    assert (found["comparison"]["pairs"], found["comparison"]["left_out"]) == (4, 2)


def test_a_reward_that_is_no_number_names_its_row(run: Run, home: Path, foreign: Path) -> None:
    """The embedding of one token is not finite: the row that holds it, and no other, is at fault."""
    broken = home / "broken"
    if not broken.exists():
        broken.mkdir()
        for path in foreign.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        weights = load_file(broken / "model.safetensors")
        token = AutoTokenizer.from_pretrained(foreign)("Q", add_special_tokens=False)["input_ids"][-1]
        weights["model.embed_tokens.weight"][token] = float("nan")
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = bench_rows(6, 3)
    rows[3]["rejected"] = "one Q"
    answer = run("evaluate", f"rm={broken}", f"data={write(home / 'nan.jsonl', rows)}", "model.layout=rows", "alone=0")
    assert answer.code == 3
    assert "the reward of 1 answer(s) is not finite" in answer.err
    assert "nan.jsonl: line 4 (3)" in answer.err


def test_a_limit_takes_the_first_rows(run: Run, home: Path, foreign: Path) -> None:
    data = write(home / "held.jsonl", bench_rows(25, 1))
    answer = run("evaluate", f"rm={foreign}", f"data={data}", "eval.limit=7", "alone=3")
    assert "25 read = 25 kept + 0 dropped   the first 7 of them   7 pairs" in answer.out
    assert "3 answers" in answer.out


def test_rows_that_end_with_the_pad_token_are_said(run: Run, home: Path, foreign: Path) -> None:
    """transformers' own pooling would read the token before it."""
    padded = home / "padded"
    if not padded.exists():
        padded.mkdir()
        for path in foreign.iterdir():
            (padded / path.name).write_bytes(path.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(foreign)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        config = json.loads((padded / "config.json").read_text())
        config["pad_token_id"] = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
        (padded / "config.json").write_text(json.dumps(config))
    data = write(home / "few.jsonl", bench_rows(4, 1))
    assert "warning  8 answers end with the model's pad token" in run("evaluate", f"rm={padded}", f"data={data}").out
    assert "warning" not in run("evaluate", f"rm={foreign}", f"data={data}").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rm={small}", "data={data}"], "without a head that gives a reward"),
        (["rm=tiny", "data={data}"], "tiny is a language model without a head"),
        (["rm={labels}", "data={data}"], "has 2 labels; a reward model has one"),
        (["rm={foreign}"], "data is missing"),
        (["{run}", "rm={foreign}", "data={data}"], "give no other one"),
        (["rm={foreign}", "model={small}", "data={data}"], "give no other one"),
        (["against={foreign}", "data={data}"], "against= goes with rm=MODEL or with judge=MODEL"),
        (["rm=[a,b,c]", "data={data}"], "two models can be compared, not 3"),
        (["rm={foreign}", "data={data}", "resamples=few"], "resamples: few (expected a whole number)"),
        (["rm={foreign}", "data={data}", "resamples=5"], "expected at least 100"),
        (["rm={foreign}", "data={sft}"], "the objective needs pairs"),
        (["rm={missing}", "data={data}"], "no model folder at"),
        (["rm={unfinished}", "data={data}"], "has no finished model"),
    ],
)
def test_wrong_input_is_one_line(
    run: Run, home: Path, small_model: Path, foreign: Path, trained: Path, words: list[str], said: str
) -> None:
    labels = home / "labels"
    if not labels.exists():
        LlamaForSequenceClassification(AutoConfig.from_pretrained(small_model, num_labels=2)).save_pretrained(labels)
        AutoTokenizer.from_pretrained(small_model).save_pretrained(labels)
    unfinished = home / "unfinished"
    unfinished.mkdir(exist_ok=True)
    (unfinished / "run.yaml").touch()
    names = {
        "unfinished": unfinished,
        "small": small_model, "foreign": foreign, "labels": labels, "run": trained, "missing": home / "nowhere",
        "data": write(home / "few.jsonl", bench_rows(4, 1)),
        "sft": write(home / "sft.jsonl", [{"prompt": "a", "completion": "b"}]),
    }  # fmt: skip
    answer = run("evaluate", *(word.format(**names) for word in words))
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize("key", ["rewards", "plot"])
def test_a_file_that_cannot_be_written_is_named(run: Run, home: Path, foreign: Path, key: str) -> None:
    data = write(home / "few.jsonl", bench_rows(4, 1))
    answer = run("evaluate", f"rm={foreign}", f"data={data}", "alone=0", "resamples=100", f"{key}={data}/x")
    assert answer.code == StorageError.exit_code
    assert f"{key}: {data}/x cannot be written" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_help_names_the_keys(run: Run) -> None:
    answer = run("evaluate", "--help")
    assert answer.code == 0
    for key in ("rm", "against", "plot", "rewards", "resamples", "alone"):
        assert f" {key}" in answer.out


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not beside this checkout")
def test_real_rows(run: Run, home: Path, foreign: Path) -> None:
    """LLMBar by subset, where the adversarial ones were made so that the longer answer is the worse one; HHH; trees."""

    def figures(rows: str, *words: str) -> dict[str, Any]:
        data = f"data={REAL}/{rows}.test.jsonl.gz"
        found: dict[str, Any] = run("evaluate", f"rm={foreign}", data, "alone=2", *words, "--json").json
        return found

    short = "data.max_length=256"
    llmbar = figures("preference/llmbar", short)
    assert set(llmbar["categories"]) == {"Natural", "Neighbor", "GPTInst", "GPTOut", "Manual"}
    assert llmbar["rows"]["read"] == 346
    assert llmbar["categories"]["Neighbor"]["longer_is_better"]["high"] < 0.5
    hhh = figures("preference/hhh_alignment", short)
    assert set(hhh["categories"]) == {"harmless", "helpful", "honest", "other"}
    assert hhh["prompts"] < hhh["pairs"]  # several pairs ask the same
    assert hhh["accuracy"]["method"] == "bootstrap"
    trees = figures("trees/oasst_trees", short, "eval.limit=5")
    assert trees["pairs"] > trees["prompts"]
    whole = figures("safety/xstest_scored", "eval.limit=6")["best_of_n"][-1]
    assert whole["oracle"] > whole["random"]
    assert whole["regret"]["value"] >= 0


def test_the_commands_of_the_page(run: Run, home: Path) -> None:
    """What docs/reward-models.md tells to try, as it stands there."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "reward-models.md").read_text(encoding="utf-8")
    blocks = [text.split("Try it")[1].split("\n\n")[1], text.split("The run's `eval/best_of")[1].split("\n\n")[1]]
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert [words[0] for words in commands] == ["train", "train", "evaluate", "evaluate", "train", "evaluate"]
    for words in commands:
        answer = run(*words)
        assert answer.code == 0, answer.err
    both = json.loads((home / "both.json").read_text())
    assert both["model"] == "runs/rm-eurus/model"
    assert both["comparison"]["against_model"] == "runs/rm-bt/model"
    assert (home / "reliability.png").is_file()
    assert list((home / "runs" / "rm-eurus" / "eval").glob("sums-rm-*.png"))
    (pools,) = (home / "runs" / "policy" / "eval").glob("best_of-*.json")
    assert {"best/eurus", "best/bt"} <= set(json.loads(pools.read_text())["ways"])
