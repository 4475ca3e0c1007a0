"""A layout proves itself before it is used, by comparison with transformers' own full forward.

Packing is exact for softmax attention over positions on a path.  A model family may break that silently: by swallowing
the plan, by carrying state along the line (linear attention, convolutions), by a window, a cap or a scale that nobody
handed on.  So a layout is tried twice.  On a small random float64 copy of the model's own configuration, one layer of
each type, a short window and longer rows, log-probabilities and gradients have to agree.  On the real model a few
tokens have to, which covers what the copy leaves out (later layers, real widths).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignlab.data.pack import batch_of
from alignlab.errors import ConfigError
from alignlab.models.scorer import Scorer, backbone, padded_attention, select_attention
from alignlab.types import Ask, EncodedSequence, Mix, PackedBatch

LAYOUTS = ("tree", "packed", "rows")
TOLERANCE = 1e-5
"""On the copy: largest difference of a log-probability, and of the gradient relative to its norm.

Most families compute norms in float32 whatever the dtype; at Gemma's widths that moves log-probabilities by 5e-6.
"""
REAL_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""On the real model, in its dtype: it finds what is wrong, and lets rounding of logits pass."""
WINDOW = 6
"""Sliding windows and attention chunks of the copy."""
VOCABULARY = 61
"""Of the copy; more than any row needs, and prime, so that no layer divides it by chance."""
LAMBDA = 0.3
"""Strength of mixed input embeddings in the proof of an objective that mixes them (IFT)."""


class Verdict(NamedTuple):
    """Whether a layout is exact for a model; ``reason`` says what differs, or was refused."""

    exact: bool
    reason: str


class Copy(NamedTuple):
    """A small random copy of a model, and what its own forward gives for :func:`sequences`."""

    model: Any
    logps: Tensor
    gradient: Tensor


def choose_layout(model: Any, wanted: str, *, mixes_inputs: bool = False, form: str = "padded") -> tuple[str, str]:
    """(layout to use, one line that says why); ``form`` is that of the attention plans which it will get.

    ``auto`` takes the first exact one of tree, packed, rows; a mixture of experts gets rows, since packed layouts are
    not measured for it.  Raises ConfigError (exit 2) when a layout was asked for by name and is not exact, or when not
    even padded rows agree with the model's own forward.
    """
    if wanted not in ("auto", *LAYOUTS):
        raise ConfigError(f"model.layout: '{wanted}' is none of auto, {', '.join(LAYOUTS)}")
    kind = model.config.model_type
    experts = wanted == "auto" and _is_mixture_of_experts(model.config)
    notes = ["packed layouts are not measured for mixtures of experts"] if experts else []
    small = _copy_or_reason(model, mixes_inputs)
    for layout in (wanted,) if wanted != "auto" else ("rows",) if experts else LAYOUTS:
        verdict = _prove(model, small, layout, mixes_inputs, form)
        if verdict.exact:
            return layout, f"layout {layout}: proved exact for {kind}" + (f" ({'; '.join(notes)})" if notes else "")
        if wanted != "auto":
            raise ConfigError(f"model.layout={wanted} is not exact for {kind}: {verdict.reason}")
        notes.append(f"{layout} is not: {verdict.reason}")
    raise ConfigError(f"no layout agrees with {kind}'s own forward: {'; '.join(notes)}")


def prove(model: Any, layout: str, *, mixes_inputs: bool = False, form: str = "padded") -> Verdict:
    """Try one layout on a small copy of ``model`` and on ``model`` itself (which is left as it was)."""
    return _prove(model, _copy_or_reason(model, mixes_inputs), layout, mixes_inputs, form)


def _prove(model: Any, small: Copy | str, layout: str, mixes_inputs: bool, form: str) -> Verdict:
    if layout != "rows" and not model._can_set_attn_implementation():
        return Verdict(False, "its attention does not go through transformers' attention interface")
    if isinstance(small, Copy):
        verdict = _guarded(lambda: _on_copy(small, padded_attention(model), layout, mixes_inputs, form))
        if not verdict.exact:
            return verdict
    elif layout != "rows":
        return Verdict(False, small)
    if next(model.parameters()).is_meta:  # a shape without weights: the copy alone can say something
        return Verdict(True, "")
    return _guarded(lambda: _on_model(model, layout, form))


def _guarded(check: Callable[[], Verdict]) -> Verdict:
    """Whatever a family's code raises, the consequence is the same: the layout is not for it."""
    try:
        return check()
    except ConfigError as error:
        return Verdict(False, str(error))
    except Exception as error:
        return Verdict(False, _named(error))


# ---------------------------------------------------------------------------------------------------------------
# On a small copy
# ---------------------------------------------------------------------------------------------------------------


def _on_copy(small: Copy, attention: str, layout: str, mixes_inputs: bool, form: str) -> Verdict:
    if small.model._can_set_attn_implementation():
        select_attention(small.model, attention)
    batch = batch_of(sequences(), layout, mixes_inputs=mixes_inputs, form=form)
    mix = Mix(_residual(batch.targets), LAMBDA) if mixes_inputs else None
    logps = _in_path_order(Scorer(small.model, "lm", layout)(batch, Ask("logps", mix)).logps, batch)
    gap = (logps.detach() - small.logps).abs().max().item()
    if not gap <= TOLERANCE:
        return Verdict(False, f"log-probabilities differ by {gap:.1g}")
    gap = ((_gradient(small.model, logps) - small.gradient).norm() / small.gradient.norm()).item()
    if not gap <= TOLERANCE:
        return Verdict(False, f"gradients differ by {gap:.1g} relative")
    return Verdict(True, "")


def _copy_or_reason(model: Any, mixes_inputs: bool) -> Copy | str:
    reason = ""
    for narrow in (True, False):  # a few families tie other sizes to the width
        try:
            small = small_copy(model, narrow)
            logps = torch.cat([naive_logps(small, sequence, mixes_inputs) for sequence in sequences()])
            return Copy(small, logps.detach(), _gradient(small, logps))
        except Exception as error:
            reason = f"no small copy can be tried ({_named(error)})"
    return reason


def small_copy(model: Any, narrow: bool = True, vocabulary: int = VOCABULARY) -> Any:
    """The architecture of ``model`` as a causal model in float64, with one layer of each type and random weights.

    Sizes that only scale shrink (words, inner width and, if ``narrow``, the number of heads); how a layer computes
    does not.  Of ``model`` only the configuration is read: its weights may be on the meta device.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.vocab_size = vocabulary
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    _keep_layers(text)
    if narrow:
        _keep_heads(text)
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 16)
    for name in ("sliding_window", "attention_window", "window_size", "attention_chunk_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, WINDOW)
    for name in ("num_labels", "id2label", "label2id"):
        config.__dict__.pop(name, None)
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
        with torch.no_grad():
            for parameter in small.parameters():
                # A fresh model's scores and logits are nearly flat: a wrong cap or window would hardly show in them.
                deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(deviation * torch.randn_like(parameter))
    small.config.use_cache = False
    return small.eval()


def _keep_layers(config: Any) -> None:
    """Keep the first layer of each kind, as far as the configuration lists its layers, and of the lists their part.

    Where a list is computed and cannot be set, the first layers up to the last new kind stay.
    """
    count = config.num_hidden_layers
    stored = {n: v for n, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == count}
    named = [getattr(config, n, None) for n in ("layer_types", "layers_block_type") if n not in stored]
    computed = [v for v in named if isinstance(v, list | tuple) and len(v) == count]
    kinds = [repr([v[layer] for v in (*stored.values(), *computed)]) for layer in range(count)]
    kept = [layer for layer in range(count) if kinds[layer] not in kinds[:layer]]
    if computed:
        kept = list(range(kept[-1] + 1))
    for name, values in stored.items():
        setattr(config, name, [values[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


def _keep_heads(config: Any) -> None:
    """Keep two groups of heads of the same size and number of queries each, and as much of the width."""
    heads, width = config.num_attention_heads, config.hidden_size
    groups = getattr(config, "num_key_value_heads", None) or heads
    if groups > 2 and heads % groups == 0 and width % groups == 0:
        config.num_attention_heads, config.hidden_size = 2 * heads // groups, 2 * width // groups
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = 2


def sequences(vocabulary: int = VOCABULARY, scale: int = 3) -> list[EncodedSequence]:
    """Two paths that share a prompt and their first targets, and a row of its own; ids from 3 up.

    With ``scale=3`` they are longer than the window, before and after the branch.
    """
    rng = np.random.Generator(np.random.Philox(key=7))
    prompt, shared, left, right, other = (rng.integers(3, vocabulary, scale * n) for n in (3, 1, 2, 3, 4))
    rows = [
        (np.concatenate((prompt, shared, left)), 3 * scale),
        (np.concatenate((prompt, shared, right)), 3 * scale),
        (other, scale),
    ]
    return [EncodedSequence(tokens.astype(np.int32), np.arange(len(tokens)) >= start) for tokens, start in rows]


def naive_logps(model: Any, sequence: EncodedSequence, mixes_inputs: bool = False) -> Tensor:
    """Log-probability of every target of one sequence, by the model's own forward on that sequence alone."""
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
    inputs: dict[str, Tensor] = {"input_ids": ids}
    places = torch.from_numpy(np.flatnonzero(sequence.target))
    if mixes_inputs:
        embedding = model.get_input_embeddings()
        own, residual = embedding(ids), embedding(_residual(ids))
        strength = LAMBDA * torch.from_numpy(sequence.target).to(own.dtype)[:, None]
        inputs = {"inputs_embeds": (1.0 - strength) * own + strength * residual}
    logits = model(**inputs, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1)[places - 1, ids[0, places]]


def _residual(targets: Tensor) -> Tensor:
    """Some other token for each target."""
    return (7 * targets + 3) % VOCABULARY


def _in_path_order(values: Tensor | None, batch: PackedBatch) -> Tensor:
    assert values is not None
    return values[batch.seq_idx]


def _gradient(model: Any, logps: Tensor) -> Tensor:
    """Of a sum with unlike weights, so that exchanged tokens show; all parameters as one vector."""
    weights = torch.linspace(-1.0, 1.0, logps.numel(), dtype=logps.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


# ---------------------------------------------------------------------------------------------------------------
# On the model itself
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _on_model(model: Any, layout: str, form: str) -> Verdict:
    """A few tokens through the real weights, against the model's own logits (or its own reward)."""
    head = "scalar" if model.get_output_embeddings() is None else "lm"
    attention, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        select_attention(model, padded_attention(model))
        rows = sequences(model.get_input_embeddings().weight.shape[0], scale=1)
        if head == "lm":  # before a scorer takes the output layer over
            expected = torch.cat([naive_logps(model, sequence) for sequence in rows])
        else:
            expected = torch.cat([_naive_reward(model, sequence) for sequence in rows])
        batch = batch_of(rows, layout, form=form)
        scores = Scorer(model, head, layout)(batch, Ask("logps" if head == "lm" else "reward"))
        found = scores.rewards if head == "scalar" else _in_path_order(scores.logps, batch)
    finally:
        select_attention(model, attention)
        model.train(training)
    gap = (found.double() - expected.double()).abs().max().item()  # type: ignore[union-attr]
    if not gap <= REAL_TOLERANCE[model.dtype]:
        what = "rewards" if head == "scalar" else "log-probabilities"
        return Verdict(False, f"{what} of the real weights differ by {gap:.1g}")
    return Verdict(True, "")


def _naive_reward(model: Any, sequence: EncodedSequence) -> Tensor:
    """[1]: the classifier's layer on its backbone's own output (its pooling may skip a last token that is the pad)."""
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
    hidden = backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    return model.score(hidden[:, -1])[:, 0]


def _is_mixture_of_experts(config: Any) -> bool:
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


def _named(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
