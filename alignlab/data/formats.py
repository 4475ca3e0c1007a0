"""What a row means: from the columns people use to a :class:`Sample`.

A format is a function ``row: dict -> Sample`` that raises :class:`DataError` naming the key; the ones here and those
of plug-ins (``@register_format``) are called the same way, through :func:`to_sample`.  Column conventions: TRL's
dataset types, Alpaca, ShareGPT, UltraFeedback, HelpSteer, Anthropic HH, UltraInteract, OpenAssistant, GSM8K.
"""

from __future__ import annotations

import math
import re
from typing import Any

from alignlab.data import fields
from alignlab.data.fields import assistant, bad, common, conversation, messages, need, text, user, with_system
from alignlab.data.rows import Row
from alignlab.errors import DataError
from alignlab.registry import FORMATS
from alignlab.types import Message, Pair, Sample, Sequence

_COLUMNS = (
    ("tokens", "input_ids | chosen_input_ids rejected_input_ids | prompt_ids chosen_ids rejected_ids"),
    ("tokens", "prompt_ids completion_ids"),
    ("trees", "trajectory chosen rejected | prompt trajectories | prompt message_tree_id | prompt replies"),
    ("scored", "instruction completions | prompt completions"),
    ("rewardbench", "prompt chosen rejected subset | prompt chosen rejected num_correct"),
    ("preference", "chosen rejected"),
    ("unpaired", "prompt completion label"),
    ("prompt_completion", "prompt completion | prompt response"),
    ("messages", "messages | conversations"),
    ("questions", "question answer | question final_answer | question options answer_idx"),
    ("alpaca", "instruction output | instruction response"),
    ("text", "text"),
    ("sampled", "prompt texts"),
    ("prompts", "prompt"),
)
"""Format -> sets of columns that mean it; the first match from the top counts."""

_THOUSANDS = re.compile(r"\D?\d{1,3}(,\d{3})+(\.\d+)?")


def recognise(columns: set[str]) -> str:
    """The format that a row with these columns has; a :class:`DataError` lists what would be recognised."""
    for name, wanted in _COLUMNS:
        if any(set(want.split()) <= columns for want in wanted.split("|")):
            return name
    known = "; ".join(f"{name}: {wanted}" for name, wanted in _COLUMNS)
    raise DataError(
        f"columns {', '.join(sorted(columns)) or '(none)'} are no known format; map them with data.columns or set "
        f"data.format ({known})"
    )


def to_sample(row: Row, format: str = "auto", *, absolute: bool = False) -> Sample:
    """What ``row`` means in a format, ``auto`` by its columns.  ``absolute``: the Eurus terms apply to its pairs.

    The sample has at least one sequence, and the file and line as its id where the row has none.  Raises
    :class:`DataError` naming file, line and key.
    """
    place = f"{row.file}: line {row.line}"
    try:
        function = FORMATS.get(recognise(set(row.value)) if format == "auto" else format)
        sample = function(row.value)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{place}: format '{format}' cannot read this row ({type(error).__name__}: {error})") from error
    if not isinstance(sample, Sample) or not sample.sequences:
        raise DataError(f"{place}: format '{format}' must return a Sample with at least one sequence")
    for pair in sample.pairs:
        if not (0 <= pair.chosen < len(sample.sequences) and 0 <= pair.rejected < len(sample.sequences)):
            raise DataError(f"{place}: format '{format}' made a pair of a sequence that is not there")
        pair.absolute = pair.absolute or absolute
    for sequence in sample.sequences:
        if sequence.input_ids is None and isinstance(sequence.prompt, str) is not isinstance(sequence.completion, str):
            raise DataError(f"{place}: prompt and completion must both be text or both be turns")
    sample.id = sample.id or f"{row.file.rpartition('/')[2]}:{row.line}"
    return sample


# ---------------------------------------------------------------------------------------------------------------
# Demonstrations
# ---------------------------------------------------------------------------------------------------------------


def from_messages(row: dict[str, Any]) -> Sample:
    """``messages`` (OpenAI, TRL) or ``conversations`` (ShareGPT): every assistant turn is a target."""
    name = "messages" if row.get("conversations") is None else "conversations"
    return common(row, Sample([conversation(with_system(row, messages(name, need(row, name))))]))


def from_prompt_completion(row: dict[str, Any]) -> Sample:
    """``prompt`` and ``completion`` (or ``response``): both text (no template) or turns; may have ``scores``."""
    sequence = _prompt_and(row, "completion" if row.get("completion") is not None else "response")
    sequence.scores = _ratings("scores", row["scores"]) if isinstance(row.get("scores"), dict) else {}
    return common(row, Sample([sequence]))


def from_text(row: dict[str, Any]) -> Sample:
    """``text``: all of it is the target."""
    return common(row, Sample([Sequence(prompt="", completion=text(row, "text"))]))


def from_alpaca(row: dict[str, Any]) -> Sample:
    """``instruction``, ``input`` (may be empty), ``output`` (or ``response``), ``system``, as one exchange."""
    asked = text(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n{text(row, 'input')}"
    turns = with_system(row, [user(asked), assistant(text(row, "output", "response"))])
    return common(row, Sample([conversation(turns)]))


def from_questions(row: dict[str, Any]) -> Sample:
    """Benchmarks' ``question``, ``answer``: GSM8K, SVAMP, multiple choice (``options``, ``answer_idx``), PubMedQA.

    ``verify`` says how a completion is judged: ``{kind: number, answer}`` or ``{kind: choice, answer}``.
    """
    asked = text(row, "question")
    verify: dict[str, Any] = {}
    if row.get("options") is not None:
        letter, options = _choice(row)
        asked = "\n".join([asked, "", *(f"{name}. {option}" for name, option in options.items())])
        answer = f"{letter}. {options[letter]}"
        verify = {"kind": "choice", "answer": letter}
    elif row.get("contexts") is not None:
        if not isinstance(row["contexts"], list):
            raise bad("contexts", "must be a list of strings", row["contexts"])
        asked = "\n".join([*map(str, row["contexts"]), "", asked])
        answer = text(row, "answer")
        verify = {"kind": "choice", "answer": answer}
        if row.get("long_answer"):
            answer = f"{text(row, 'long_answer')}\n\nAnswer: {answer}"
    else:
        answer = str(need(row, "answer", "final_answer"))
        final = row.get("final_answer")
        if final is None and "####" in answer:
            final = answer.rpartition("####")[2]
        if final is not None:
            final = str(final).strip()  # a comma between thousands goes, that of a pair or an interval stays
            verify = {"kind": "number", "answer": final.replace(",", "") if _THOUSANDS.fullmatch(final) else final}
    return common(row, Sample([conversation(with_system(row, [user(asked), assistant(answer)]))], verify=verify))


def from_prompts(row: dict[str, Any]) -> Sample:
    """``prompt`` alone: nothing to train on, but something to answer and to verify."""
    value = need(row, "prompt")
    turns = messages("prompt", value) if fields.is_turns(value) else [user(text(row, "prompt"))]
    return common(row, Sample([Sequence(prompt=with_system(row, turns), completion=[])]))


# ---------------------------------------------------------------------------------------------------------------
# Preferences
# ---------------------------------------------------------------------------------------------------------------


def from_unpaired(row: dict[str, Any]) -> Sample:
    """``prompt``, ``completion``, ``label`` (true: desirable)."""
    sequence = _prompt_and(row, "completion")
    sequence.label = fields.boolean("label", need(row, "label"))
    return common(row, Sample([sequence]))


def from_preference(row: dict[str, Any]) -> Sample:
    """``chosen`` and ``rejected``, with ``prompt`` or with the prompt in front of both; turns, text or HH transcripts.

    Optional: ``score_chosen``, ``score_rejected``, ``margin``.
    """
    chosen, rejected = need(row, "chosen"), need(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and row.get("prompt") is None:
        if _HH.match(chosen) and _HH.match(rejected):
            return from_hh(row)
        if "conversations" not in row and "question" not in row:
            shared = _shared_text(chosen, rejected)
            made = [Sequence(prompt=chosen[:shared], completion=side[shared:]) for side in (chosen, rejected)]
            return common(row, _pair(row, made))
    if fields.is_turns(chosen) != fields.is_turns(rejected):
        raise bad("rejected", "must have the form of 'chosen' (text or turns)", rejected)
    made = _implicit(row) or [_prompt_and(row, side) for side in ("chosen", "rejected")]
    return common(row, _pair(row, made))


_HH = re.compile(r"\s*(Human|Assistant): ?", re.IGNORECASE)
_HH_TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant): ?")


def from_hh(row: dict[str, Any]) -> Sample:
    """Anthropic's transcripts: ``chosen`` and ``rejected`` are whole dialogues of ``Human:`` and ``Assistant:``."""
    return common(row, _pair(row, _split_turns(*(_transcript(row, side) for side in ("chosen", "rejected")))))


def _transcript(row: dict[str, Any], name: str) -> list[Message]:
    said = text(row, name).strip("\n")
    parts = _HH_TURN.split(said)
    if len(parts) < 3 or parts[0].strip():
        raise bad(name, 'must be a transcript of "\\n\\nHuman:" and "\\n\\nAssistant:"', said)
    makers = {"Human": user, "Assistant": assistant}
    return [makers[who](content.strip()) for who, content in zip(parts[1::2], parts[2::2], strict=True)]


def _implicit(row: dict[str, Any]) -> list[Sequence] | None:
    """Two whole conversations with the prompt in front of both, where ``chosen`` begins with another's turn."""
    if not fields.is_turns(row["chosen"]):
        return None
    sides = [messages(name, row[name]) for name in ("chosen", "rejected")]
    if not all(sides):
        raise bad("chosen", "must hold at least one turn", row["chosen"])
    given = row.get("prompt")
    if given is not None and fields.is_turns(given):
        prompt = messages("prompt", given)
        if not all(side[: len(prompt)] == prompt and len(side) > len(prompt) for side in sides):
            return None
    elif sides[0][0]["role"] == "assistant":
        return None
    # Else a prompt given as text besides whole conversations (UltraFeedback binarized) says the same once more.
    return _split_turns(*(with_system(row, side) for side in sides))


def _split_turns(chosen: list[Message], rejected: list[Message]) -> list[Sequence]:
    """The longest common prefix is the prompt, but never the last turn."""
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    return [Sequence(prompt=chosen[:shared], completion=side[shared:]) for side in (chosen, rejected)]


def _shared_text(chosen: str, rejected: str) -> int:
    """TRL's rule: the common prefix, without a space at its end (it belongs to the first word of the completion)."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        return 0 if chosen == rejected else min(len(chosen), len(rejected))
    return shared - 1 if shared and chosen[shared - 1] == " " else shared


def _pair(row: dict[str, Any], made: list[Sequence]) -> Sample:
    for sequence, name in zip(made, ("score_chosen", "score_rejected"), strict=True):
        if row.get(name) is not None:
            sequence.scores["overall"] = fields.number(name, row[name])
    return Sample(made, [Pair(0, 1)])


def _prompt_and(row: dict[str, Any], name: str) -> Sequence:
    """The prompt (``prompt``, or ShareGPT's ``conversations``, or ``question``) with one completion, in one form."""
    asked = next((key for key in ("prompt", "conversations", "question") if row.get(key) is not None), "prompt")
    prompt, said = need(row, asked), need(row, name)
    if isinstance(prompt, str) and isinstance(said, str) and asked == "prompt" and not row.get("system"):
        return Sequence(prompt=prompt, completion=said)
    before = messages(asked, prompt) if fields.is_turns(prompt) else [user(text(row, asked))]
    after = messages(name, said) if fields.is_turns(said) else [assistant(text(row, name))]
    return Sequence(prompt=with_system(row, before), completion=after)


# ---------------------------------------------------------------------------------------------------------------
# Scored completions
# ---------------------------------------------------------------------------------------------------------------


def from_scored(row: dict[str, Any]) -> Sample:
    """``instruction`` (or ``prompt``) and ``completions: [{response, annotations | labels | scores | overall_score}]``.

    UltraFeedback (ratings as ``{"Rating": "4"}``; "N/A" is left out), HelpSteer (plain numbers), XSTest's labels, and
    FineGrainedRLHF's ``pairwise`` judgements, which become pairs.
    """
    asked = need(row, "instruction", "prompt")
    prompt = messages("prompt", asked) if fields.is_turns(asked) else [user(text(row, "instruction", "prompt"))]
    prompt = with_system(row, prompt)
    completions = need(row, "completions")
    if not isinstance(completions, list) or not completions:
        raise bad("completions", "must be a list of objects", completions)
    made = []
    for i, completion in enumerate(completions):
        if not isinstance(completion, dict):
            raise bad(f"completions[{i}]", "must be an object with a response", completion)
        said = completion.get("response", completion.get("text", completion.get("content")))
        if not isinstance(said, str):
            raise bad(f"completions[{i}].response", "must be a string", said)
        made.append(Sequence(prompt, [assistant(said)], scores=_scores(row, completion, f"completions[{i}]")))
    return common(row, Sample(made, _pairwise(row, len(made))))


def _scores(row: dict[str, Any], completion: dict[str, Any], key: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("annotations", "labels", "scores", "ratings"):
        if isinstance(completion.get(name), dict):
            found.update(_ratings(f"{key}.{name}", completion[name]))
    for name in ("overall_score", "score", "overall"):
        rating = _rating(f"{key}.{name}", completion.get(name))
        if rating is not None:
            found["overall"] = rating
    if "final_label" in completion and isinstance(row.get("prompt_is_safe"), bool):
        # XSTest: answering is right where the prompt is safe, refusing where it is not.
        complied = {"1": 1.0, "2": 0.0, "3": 0.5}.get(str(completion["final_label"])[:1])
        if complied is not None:
            safe = row["prompt_is_safe"]
            found["helpfulness" if safe else "harmlessness"] = complied if safe else 1.0 - complied
    return found


def _ratings(key: str, value: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, rating in value.items():
        # UltraFeedback: {"Rating": "4", ...}; UltraSafety: a list of such judgements.
        judged = rating if isinstance(rating, list) else [rating]
        given = [one["Rating"] if isinstance(one, dict) and "Rating" in one else one for one in judged]
        made = [number for one in given if (number := _rating(f"{key}.{name}", one)) is not None]
        if made:
            found[name] = sum(made) / len(made)
    return found


def _rating(key: str, value: Any) -> float | None:
    """A rating as a number; None where the source says there is none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("n/a", "na", "none", "")):
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return fields.number(key, value)


def _pairwise(row: dict[str, Any], count: int) -> list[Pair]:
    pairs = []
    for i, judged in enumerate(row.get("pairwise") or []):
        sides = {"a": judged.get("a"), "b": judged.get("b")} if isinstance(judged, dict) else {}
        if any(type(side) is not int or not 0 <= side < count for side in sides.values()) or not sides:
            raise bad(f"pairwise[{i}]", "must have a and b, numbers of completions", judged)
        a, b = int(judged["a"]), int(judged["b"])
        if judged.get("preferred") in ("a", "b"):
            pairs.append(Pair(a, b) if judged["preferred"] == "a" else Pair(b, a))
    return pairs


def _choice(row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    options = row["options"]
    if isinstance(options, list):
        options = {chr(ord("A") + i): option for i, option in enumerate(options)}
    if not isinstance(options, dict) or not options:
        raise bad("options", "must be an object or a list", row["options"])
    given = need(row, "answer_idx", "answer")
    letter = list(options)[given] if type(given) is int and 0 <= given < len(options) else given
    if letter not in options:
        raise bad("answer_idx", f"must be one of {', '.join(options)}", given)
    return letter, {name: str(option) for name, option in options.items()}


# ---------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------


def from_tokens(row: dict[str, Any]) -> Sample:
    """Rows tokenised elsewhere: ``input_ids`` with ``prompt_length``, ``labels`` or ``completion_mask`` (TRL's names
    included); ``chosen_input_ids`` and ``rejected_input_ids`` hold the prompt too, ``chosen_ids`` do not."""
    if row.get("chosen_input_ids") is not None:
        sides = [_tokens(row, fields.token_ids(row, f"{side}_input_ids")) for side in ("chosen", "rejected")]
        return common(row, _pair(row, sides))
    if row.get("prompt_ids") is not None:
        prompt = fields.token_ids(row, "prompt_ids")
        names = ["completion_ids"] if row.get("chosen_ids") is None else ["chosen_ids", "rejected_ids"]
        made = [_tokens({"prompt_length": len(prompt)}, prompt + fields.token_ids(row, name)) for name in names]
        sample = _pair(row, made) if len(made) == 2 else Sample(made)
    else:
        sample = Sample([_tokens(row, fields.token_ids(row, "input_ids"))])
    if row.get("label") is not None and not sample.pairs:
        sample.sequences[0].label = fields.boolean("label", row["label"])
    return common(row, sample)


def _tokens(row: dict[str, Any], ids: list[int]) -> Sequence:
    mask = [True] * len(ids)
    if row.get("prompt_length") is not None:
        length = row["prompt_length"]
        if type(length) is not int or not 0 <= length <= len(ids):
            raise bad("prompt_length", f"must be a number from 0 to {len(ids)}", length)
        mask = [i >= length for i in range(len(ids))]
    for name in ("labels", "completion_mask", "assistant_masks"):
        if row.get(name) is None:
            continue
        if not isinstance(row[name], list) or len(row[name]) != len(ids):
            raise bad(name, f"must be a list of {len(ids)} numbers, as input_ids is", row[name])
        if name == "labels":
            wrong = next((i for i, token in enumerate(ids) if row[name][i] not in (-100, token)), None)
            if wrong is not None:
                raise bad(f"labels[{wrong}]", f"must be -100 or the token {ids[wrong]} (not shifted)", row[name][wrong])
        mask = [m and bool(v != -100 if name == "labels" else v) for m, v in zip(mask, row[name], strict=True)]
    return Sequence(input_ids=ids, target_mask=[m and i > 0 for i, m in enumerate(mask)])
