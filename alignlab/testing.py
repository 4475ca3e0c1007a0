"""``check_objective``: the invariants every objective has to keep, run on a tiny model and random prompt trees.

For an objective from outside the tree, a test is one line: ``alignlab.testing.check_objective(Mine)``.  Everything is
in float64 on a CPU; a run takes a few seconds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.data.index import Index
from alignlab.data.loader import Loader
from alignlab.data.random_trees import VOCABULARY, random_sample, write_index
from alignlab.errors import CheckFailed, ConfigError
from alignlab.metrics import Meter, finish
from alignlab.models.scorer import Scorer
from alignlab.train.single import plans_of, run_step
from alignlab.types import Ask, EncodedSample, Objective, PackedBatch, Scores, StepContext, Unit

TOLERANCE = 1e-6
"""Relative, in float64: between layouts and between ways to cut a step."""
NO_EFFECT = 1e-9
"""A field that moves loss and gradients by no more than this, relative, does nothing."""
CUTS: dict[str, dict[str, Any]] = {
    "rows, one micro-batch": {"layout": "rows"},
    "rows, cut": {"layout": "rows", "max_examples": 2},
    "packed": {"layout": "packed"},
    "packed, cut": {"layout": "packed", "token_budget": 60},
    "tree": {"layout": "tree"},
    "tree, cut": {"layout": "tree", "token_budget": 40},
    "tree, a filler": {"layout": "tree", "max_examples": 3, "dp": 4},
}


@dataclass(frozen=True)
class Result:
    """One optimizer step without an update: loss, gradients by parameter, finished statistics."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def check_objective(objective: Any, config: Any = None, *, knobs: bool = True, seed: int = 0) -> None:
    """Run the invariant suite on an objective class; raises :class:`CheckFailed` naming the first broken one.

    With ``config`` (an instance of ``objective.Config``) the invariants hold for that configuration; the fields of
    ``Config`` are checked from their defaults, unless ``knobs=False``.

    1. Declarations: ``name``, ``Config`` (a dataclass), ``units``, ``example``, ``head``.
    2. The loss and all gradients are finite, and equal to those of a plain padded forward of the unmodified model.
    3. They do not depend on layout (rows, packed, tree), micro-batches, or fillers; nor do the statistics.
    4. Two runs are equal to the bit; twice every weight is the same loss; weight 0 is absence.
    5. Evaluation (no gradients, ``training=False``) works.
    6. Every field of ``Config`` changes the loss or a gradient.  Numbers and booleans are changed for you; for others
       say how: ``field(default=..., metadata={"live": ({}, {"my_field": "other"})})``, the options to compare.
    """
    _declarations(objective)
    subject = objective(objective.Config() if config is None else config)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), subject.head, seed)
        expected = world.step(subject, naive=True)
        _finite(subject, expected)
        for name, cut in CUTS.items():
            _equal(f"{name} against a plain forward", world.step(subject, **cut), expected)
        again = [world.step(subject) for _ in range(2)]
        _equal("the same step twice", again[0], again[1], tolerance=0.0)
        _equal("twice every weight", world.step(subject, weights="doubled"), expected, metrics=False)
        if not subject.mismatched:  # a row that is absent is nobody's partner either
            _equal(
                "weight 0 against absence", world.step(subject, weights="zero"), world.step(subject, weights="absent")
            )
        world.step(subject, training=False)
    for key, (base, changed, effect) in knob_effects(objective, seed=seed).items() if knobs else ():
        if effect <= NO_EFFECT:
            raise CheckFailed(f"{objective.name}.{key} changes neither loss nor gradients ({base} -> {changed})")


def knob_effects(
    objective: Any, *, samples: int = 5, seed: int = 0
) -> dict[str, tuple[dict[str, Any], dict[str, Any], float]]:
    """For every field of ``objective.Config``: two sets of options and how far apart their steps are.

    The distance is the larger of the relative differences of loss and gradients, on a tiny model and ``samples``
    random prompt trees.  Raises :class:`CheckFailed` for a field nobody says how to change.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), objective.head, seed, samples)
        for key, (base, changed) in _changes(objective.Config).items():
            results = [world.step(objective(objective.Config(**options)), naive=True) for options in (base, changed)]
            found[key] = (base, changed, distance(*results))
    return found


# ---------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------


def _declarations(objective: Any) -> None:
    for name in ("name", "Config", "units", "example", "head"):
        if not hasattr(objective, name):
            raise CheckFailed(f"{objective.__name__} has no attribute '{name}'; derive it from BaseObjective")
    if not (isinstance(objective.Config, type) and is_dataclass(objective.Config)):
        raise CheckFailed(f"{objective.name}.Config is no dataclass")
    if not isinstance(objective(objective.Config()), Objective):
        raise CheckFailed(f"{objective.name} lacks a member of alignlab.types.Objective; derive it from BaseObjective")
    if objective.example not in (Unit.PAIR, Unit.SEQUENCE) or objective.head not in ("lm", "scalar"):
        raise CheckFailed(f"{objective.name}: example is PAIR or SEQUENCE, head is 'lm' or 'scalar'")


def _finite(objective: Any, result: Result) -> None:
    if not np.isfinite(result.loss):
        raise CheckFailed(f"{objective.name}: the loss is {result.loss}")
    for name, gradient in result.gradients.items():
        if not gradient.isfinite().all():
            raise CheckFailed(f"{objective.name}: the gradient of {name} is not finite")
    if not any(gradient.any() for gradient in result.gradients.values()):
        raise CheckFailed(f"{objective.name}: no parameter gets a gradient")


def distance(one: Result, other: Result) -> float:
    """The larger of the loss's and the gradients' relative difference."""
    scale = max(abs(one.loss), abs(other.loss), 1e-12)
    found = abs(one.loss - other.loss) / scale
    norm = sum(float((g**2).sum()) for g in other.gradients.values()) ** 0.5
    apart = sum(float(((one.gradients[n] - g) ** 2).sum()) for n, g in other.gradients.items()) ** 0.5
    return max(found, apart / max(norm, 1e-12))


def _equal(what: str, found: Result, expected: Result, *, tolerance: float = TOLERANCE, metrics: bool = True) -> None:
    apart = distance(found, expected)
    if not apart <= tolerance:
        raise CheckFailed(
            f"{what}: loss {found.loss:.9g} where {expected.loss:.9g} was expected, relative difference of loss or "
            f"gradients {apart:.2g}; sums must be sums over the unit, and a row must not depend on its neighbours"
        )
    if not metrics:
        return
    if found.metrics.keys() != expected.metrics.keys():
        raise CheckFailed(f"{what}: statistics {sorted(found.metrics.keys() ^ expected.metrics.keys())} come and go")
    for name, value in found.metrics.items():
        if abs(value - expected.metrics[name]) > max(tolerance, 1e-12) * max(1.0, abs(value)):
            raise CheckFailed(
                f"{what}: statistic {name} is {value:.9g} where {expected.metrics[name]:.9g} was expected"
            )


def _changes(config: type) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For every field two sets of options that must give different results."""
    return {field.name: _change(config, field) for field in fields(config)}


def _change(config: type, field: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if "live" in field.metadata:
        return field.metadata["live"]
    default = field.default if field.default is not MISSING else None
    if isinstance(default, bool):
        return {}, {field.name: not default}
    if isinstance(default, int | float):
        for value in (default * 1.5 + 1, default * 1.5 + 0.05, default * 0.5):
            changed = {field.name: type(default)(value)}
            try:
                config(**changed)
            except (ConfigError, ValueError):
                continue
            return {}, changed
    raise CheckFailed(
        f"Config.{field.name}: say how to change it, field(default=..., "
        f"metadata={{'live': ({{}}, {{'{field.name}': OTHER}})}})"
    )


# ---------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------


def one_step(
    model: Any,
    index: Index,
    objective: Any,
    *,
    mismatched: Mapping[tuple[int, int], float] | None = None,
    naive: bool = False,
    training: bool = True,
    layout: str = "rows",
    seed: int = 0,
    **limits: Any,
) -> Result:
    """Loss, gradients and statistics of one optimizer step over all examples of ``index``, through the training code.

    ``model`` is a causal language model or a sequence classifier with one label.  Numbers attached to the index
    (``reference``) reach the objective; ``mismatched`` are KTO's, by (own, partner).  ``naive`` takes the unmodified
    model's padded forward instead of the scorer; ``limits`` are those of a step plan (``max_examples``, ``dp``, ...).
    """
    plan = plans_of(index, objective, seed, layout=layout, **limits).at(0)
    plan = replace(plan, dp=1)  # one process runs the micro-batches of every rank, fillers included
    dtype = next(model.parameters()).dtype
    loader = Loader(index, layout, torch.device("cpu"), dtype, 0, mixes_inputs=objective.mixes_inputs)
    loader.mismatched_values = {"reference": mismatched or {}}
    if not naive:
        model = copy.deepcopy(model)  # the scorer puts its own head and attention into the model it is given
    score = NaiveScorer(model, objective.head) if naive else Scorer(model, objective.head, layout)
    context = StepContext(
        step=1, total_steps=10, warmup_steps=4, seed=seed, totals=plan.totals, training=training
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    meter = Meter()
    loss = run_step(score, objective, loader, plan, context, meter)
    named = model.named_parameters()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
    names = meter.names
    return Result(loss.item(), gradients, finish(names, meter.stacked(names, torch.device("cpu"))))


def all_mismatched_pairs(index: Index, objective: Any, seed: int = 0) -> list[tuple[int, int]]:
    """(own sequence, partner) of the step that :func:`one_step` runs."""
    return [(own, partner) for own, partner in plans_of(index, objective, seed).mismatched_pairs(0).tolist()]


# ---------------------------------------------------------------------------------------------------------------
# The tiny model and its rows
# ---------------------------------------------------------------------------------------------------------------


class World:
    """A random Llama in float64 and random trees, with every number a row can have."""

    def __init__(self, folder: Path, head: str, seed: int, samples: int = 5) -> None:
        self.seed, self.head = seed, head
        self.model = tiny_model(head, seed)
        rng = np.random.default_rng(seed)
        made = [random_sample(rng, number) for number in range(samples)]
        kinds = ("plain", "doubled", "zero", "absent")
        self.indices = {kind: write_index(folder / kind, _weighted(made, kind)) for kind in kinds}
        for index in self.indices.values():
            numbers = [
                self._reference(index.sequence(n).tokens, index.sequence(n).target) for n in range(index.num_sequences)
            ]
            index.attach("reference", np.array(numbers, dtype=np.float32))

    def step(self, objective: Any, *, weights: str = "plain", **options: Any) -> Result:
        """One step over all examples of the rows."""
        index = self.indices[weights]
        mismatched = {}
        if objective.mismatched and objective.wants_statistics:
            mismatched = {
                pair: self._mismatched(index, *pair) for pair in all_mismatched_pairs(index, objective, self.seed)
            }
        return one_step(self.model, index, objective, mismatched=mismatched, seed=self.seed, **options)

    def _reference(self, tokens: np.ndarray, target: np.ndarray) -> float:
        """A reference near the policy: its own log-probability, off by a number that the tokens decide."""
        if self.head != "lm":
            return 0.0
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            logps = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        own = logps.gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(target[1:].copy())].sum()
        return float(own) + 0.5 * np.sin(float(tokens.sum())) - 0.2

    def _mismatched(self, index: Index, own: int, partner: int) -> float:
        first, second = index.sequence(own), index.sequence(partner)
        cut, begin = index.prompt_lengths[own], index.prompt_lengths[partner]
        return self._reference(
            np.concatenate((first.tokens[:cut], second.tokens[begin:])),
            np.concatenate((first.target[:cut], second.target[begin:])),
        )


class NaiveScorer:
    """The scorer's twin for the layout ``rows``: the unmodified model's own padded forward, all logits at once."""

    def __init__(self, model: Any, head: str) -> None:
        self.model, self.head = model, head

    def __call__(self, batch: PackedBatch, ask: Ask) -> Scores:
        inputs = self.model.get_input_embeddings()(batch.input_ids)
        if ask.mix is not None:
            inputs = self._mixed(inputs, batch, ask)
        if ask.want == "reward":
            hidden = self.model.model(inputs_embeds=inputs, attention_mask=batch.attention_mask).last_hidden_state
            return Scores(rewards=self.model.score(hidden.flatten(0, 1)[batch.last])[:, 0])
        logits = self.model(inputs_embeds=inputs, attention_mask=batch.attention_mask).logits
        logps = logits.flatten(0, 1)[batch.scored].log_softmax(-1)
        if ask.want == "logps":
            return Scores(logps=logps.gather(1, batch.targets[:, None])[:, 0])
        if ask.want == "greedy":
            return Scores(tokens=logps.argmax(-1))
        return Scorer(copy.deepcopy(self.model), self.head, "rows")(
            batch, ask
        )  # a draw is the scorer's; it has no twin

    def _mixed(self, inputs: Tensor, batch: PackedBatch, ask: Ask) -> Tensor:
        assert ask.mix is not None
        flat = inputs.flatten(0, 1)
        other = self.model.get_input_embeddings()(ask.mix.residual)
        strength = ask.mix.lambda_
        flat = flat.index_put((batch.target_rows,), (1 - strength) * flat[batch.target_rows] + strength * other)
        return (flat.detach() if ask.mix.frozen_embeddings else flat).view_as(inputs)


def tiny_model(head: str, seed: int) -> Any:
    """A two-layer Llama over 31 tokens, float64, without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3,
        "tie_word_embeddings": False, "num_labels": 1, "pad_token_id": 0, "attn_implementation": "sdpa",
    }  # fmt: skip
    config = LlamaConfig(**options)
    kind = LlamaForCausalLM if head == "lm" else LlamaForSequenceClassification
    return kind(config).double()


def _weighted(samples: list[EncodedSample], kind: str) -> Iterator[EncodedSample]:
    """``doubled``: every weight twice; ``zero``: the last sample weighs nothing; ``absent``: it is not there."""
    for number, sample in enumerate(samples):
        last = number == len(samples) - 1
        if kind == "absent" and last:
            continue
        factor = 2.0 if kind == "doubled" else 0.0 if kind == "zero" and last else 1.0
        values = [
            {name: array * factor if name == "weight" else array for name, array in given.items()}
            for given in (sample.sequence_values, sample.pair_values)
        ]
        yield replace(sample, sequence_values=values[0], pair_values=values[1])
