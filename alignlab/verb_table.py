"""The verbs of the command line: what each is for, where it lives, and which keys are its own.

A table and nothing else: ``--help`` is answered from it, so it imports no verb.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb lives, what it is for, what its configuration must hold, and what its first argument is."""

    path: str
    help: str
    beginner: bool = False
    needs: tuple[str, ...] = ()
    target: str = "config"
    """``config``: a YAML file or run folder to compose from; ``model``: a run or a model; ``words``: no composition"""
    own: tuple[str, ...] = ()
    """keys of the verb's own, which no configuration has"""
    flags: tuple[str, ...] = ()
    """those of them that may be written as flags: ``lint`` (``--lint``), ``write=PATH`` (``--write PATH``)"""
    forms: tuple[str, ...] = ()
    """what it is written like, one line a use, for ``--help``"""


ALL = ("model", "data", "objective")
LINT = ("benchmark", "ngram", "against", "similarity", "keep", "drop")
JUDGE = (
    "base_url", "api_key_env", "template", "condition", "temperature", "max_tokens", "extra", "concurrency",
    "max_retries", "timeout", "price_in", "price_out", "dry_run",
)  # fmt: skip
TASKS = ("include_path", "num_fewshot", "limit", "chat_template")
VERBS: dict[str, Verb] = {
    "train": Verb("alignlab.verbs.train:run", "train a model; the same command goes on where it stopped", True, ALL),
    "prepare": Verb("alignlab.verbs.prepare:run", "fetch and build everything train needs; no GPU", False, ALL),
    "inspect": Verb(
        "alignlab.verbs.inspect:run", "rows as the model sees them, targets marked; --lint: what is wrong with them",
        True, ALL, flags=("lint", "write=PATH"),
        own=("lint", "write", *(f"lint.{name}" for name in LINT)),
    ),
    "probe": Verb("alignlab.verbs.probe:run", "loss and gradient norms of the first step, no update", False, ALL),
    "verify": Verb(
        "alignlab.verbs.verify:run", "ways to train that must agree, tried on your rows: a matrix, exit 1 if one fails",
        False, ALL, own=("rows", "steps", "layers", "cells"),
    ),
    "validate": Verb(
        "alignlab.verbs.validate:run",
        "what is wrong with a configuration, without training; dry_run=true: two small steps",
        False, ALL, own=("dry_run",),
    ),
    "plan": Verb(
        "alignlab.verbs.plan:run", "memory, steps and cost of a training before it starts; no GPU, no weights",
        False, ALL, own=("gpu", "mfu", "dollars_per_gpu_hour", "steps"),
    ),
    "show": Verb("alignlab.verbs.show:run", "options, keys, and the composed configuration with who set what", True),
    "evaluate": Verb(
        "alignlab.verbs.evaluate:run",
        "loss, accuracy, verifier on held-out rows; a reward model: evaluate rm=MODEL data=ROWS",
        True, (), "model", own=(
            "rm", "against", "plot", "rewards", "resamples", "alone", "control", "prompts", "front", "score", "best_of",
            "temperature", "measure", "judge", *(f"judge.{name}" for name in JUDGE),
            "tasks", *(f"tasks.{name}" for name in TASKS),
        ),
        forms=(
            "evaluate RUN [data=ROWS]                         loss, accuracy, a verifier's figures",
            "evaluate rm=MODEL data=ROWS [against=MODEL]      a reward model (docs/reward-models.md)",
            "evaluate RUN control=true [prompts=50]           what a request moves, cpsft and cpo (docs/control.md)",
            "evaluate RUN best_of=8 score=MODEL               re-ranking of sampled answers",
            "evaluate RUN_OR_FILE judge=NAME [against=OTHER]  a judge behind a chat endpoint (docs/evaluation.md)",
            "evaluate RUN tasks=gsm8k,arc_easy                benchmarks of the lm-eval harness (docs/evaluation.md)",
        ),
    ),
    "sample": Verb(
        "alignlab.verbs.sample:run", "answers of a run or model, generated in batches", True, (), "model", forms=(
            "sample RUN eval.prompt='...'",
            "sample RUN data=ROWS [eval.generate=20] [eval.temperature=0.7 eval.num_samples=4] [eval.backend=vllm]",
        ),
    ),
    "chat": Verb(
        "alignlab.verbs.chat:run", "talk with a run or a model in the terminal", False, (), "model",
        own=("system", "condition"),
    ),
    "export": Verb("alignlab.verbs.export:run", "a run as a plain Hugging Face folder", True, (), "model"),
    "ledger": Verb(
        "alignlab.verbs.ledger:run", "what a run saw: ledger RUN [step=N | sample=ID | other=RUN]", False, (), "words"
    ),
    "diff": Verb(
        "alignlab.verbs.diff:run", "what two runs differ in, and where their numbers part: diff RUN_A RUN_B",
        False, (), "words",
    ),
    "loop": Verb(
        "alignlab.verbs.loop:run", "rounds of sample, score, pair, train: preferences among the policy's own answers",
        False, ALL, own=(
            "rounds", "prompts", "samples", "temperature", "scorer", "measure", "score", "own_answer", "threshold",
            "policy_init", "reference", "data_window", "held_out",
        ),
    ),
    "reproduce": Verb(
        "alignlab.verbs.reproduce:run", "a recipe's stages and a verdict: reproduce RECIPE|all [scale=toy|small|paper]",
        False, (), "words", own=(
            "scale", "seed", "rows", "workers", "output_dir", "only", "calibrate", "broken", "execute", "dry_run",
            "set.<stage>.<key>",
        ),
    ),
    "report": Verb(
        "alignlab.verbs.report:run", "the page of a run: curves, how to read them, the pairs most probably mislabelled",
        False, (), own=("suspects",),
    ),
    "env": Verb("alignlab.verbs.env:run", "versions, devices, cache", False, (), "words"),
    "cache": Verb("alignlab.verbs.cache:run", "what is cached: cache ls | cache rm KIND [KEY]", False, (), "words"),
    "ls": Verb(
        "alignlab.verbs.ls:run", "runs in a folder and how they stand; ls recipes: what can be reproduced", False, (),
        "words",
    ),
}  # fmt: skip
