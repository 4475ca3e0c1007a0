"""Templates of every habit we know of: which tokens are targets, and that text from a row never becomes control."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignlab.data.formats import to_sample
from alignlab.data.rows import Row, read_rows
from alignlab.data.template import Dropped, Encoder
from alignlab.errors import ConfigError, DataError
from alignlab.types import EncodedSample, Pair, Sample, Sequence

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
# As Qwen3: reasoning of turns before the last user turn is dropped, the last answer always has a think block.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set c = m.content %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if loop.index0 > ns.last and (loop.last or r) %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ c.lstrip('\n') }}{% for t in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + t.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt closes an empty think block that turns of the history are written without.
NO_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
ALL = {
    "chatml": CHATML,
    "system": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "thinking": THINKING,
    "no_think": NO_THINK,
}


def make_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["the answer is here and there\n\nuser assistant system what is the question", "<|im_end|> think tool"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    made.chat_template = template
    return made


TOKENIZER = make_tokenizer()


def turns(*said: str) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": text}
        for role, text in zip(itertools.cycle(("user", "assistant")), said, strict=False)
    ]


def chat(*said: str) -> Sample:
    conversation = turns(*said)
    return Sample([Sequence(conversation[:1], conversation[1:])], id="r")


def encoded(encoder: Encoder, sample: Sample) -> EncodedSample:
    made = encoder.encode(sample)
    assert isinstance(made, EncodedSample), made
    return made


def written(sequence: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff(sequence.target, prepend=False, append=False))
    return [tokenizer.decode(sequence.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("chatml", "one<|im_end|>\n", "two<|im_end|>\n"),
        ("system", "one<|im_end|>\n", "two<|im_end|>\n"),
        ("llama3", "one<|eot_id|>", "two<|eot_id|>"),
        ("mistral", " one</s>", " two</s>"),
        ("zephyr", "one</s>", "two</s>"),
        ("thinking", "one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"),
        ("no_think", "one<|im_end|>\n", "two<|im_end|>\n"),
    ],
)
def test_all_assistant_turns_with_their_terminators_are_targets(name: str, first: str, last: str) -> None:
    encoder = Encoder(TOKENIZER, ALL[name])
    conversation = turns("what?", "one", "and then?", "two")
    (sequence,) = encoded(encoder, Sample([Sequence(conversation[:1], conversation[1:])], id="r")).sequences
    assert written(sequence) == [first, last]
    assert encoder.terminators(sequence) == (2, 2)
    # One joint encoding of the rendered text, nothing added: what TRL trains on.
    joint = TOKENIZER.apply_chat_template(conversation, chat_template=ALL[name], tokenize=True, return_dict=False)
    assert sequence.tokens.tolist() == joint


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_prompt_to_answer_is_a_prefix_and_never_a_target(name: str) -> None:
    encoder = Encoder(TOKENIZER, ALL[name])
    sample = chat("what?", "one", "and then?", "two")
    sample.sequences[0] = Sequence(turns("what?", "one", "and then?"), turns("x", "two")[1:])
    (sequence,) = encoded(encoder, sample).sequences
    prompt = encoder.render_prompt(sample.sequences[0].prompt or [])
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    assert sequence.target.tolist() == [False] * len(prompt) + [True] * (len(sequence.tokens) - len(prompt))


def test_spans_equal_a_naive_walk_over_rendered_prefixes() -> None:
    encoder = Encoder(TOKENIZER, CHATML)
    conversation = turns("a\n", "\u00e9\U0001f600 b", "c", " d  ", "e", "f")
    (sequence,) = encoded(encoder, Sample([Sequence(conversation[:1], conversation[1:])], id="r")).sequences
    ids: list[int] = []
    mask: list[bool] = []
    for turn in conversation:
        head = TOKENIZER.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
        body = TOKENIZER.encode(f"{turn['content']}<|im_end|>\n", add_special_tokens=False)
        ids, mask = [*ids, *head, *body], [*mask, *[False] * len(head), *[turn["role"] == "assistant"] * len(body)]
    assert (sequence.tokens.tolist(), sequence.target.tolist()) == (ids, mask)


def test_thinking_template_drops_history_and_drop_renders_one_path_a_turn() -> None:
    said = ("q", "<think>\nwhy\n</think>\n\none", "r", "<think>\nhow\n</think>\n\ntwo")
    (kept,) = encoded(Encoder(TOKENIZER, THINKING), chat(*said)).sequences
    assert written(kept) == ["one<|im_end|>\n", "<think>\nhow\n</think>\n\ntwo<|im_end|>\n"]
    first, second = encoded(Encoder(TOKENIZER, THINKING, history_reasoning="drop"), chat(*said)).sequences
    assert written(first) == ["<think>\nwhy\n</think>\n\none<|im_end|>\n"]
    assert written(second) == ["<think>\nhow\n</think>\n\ntwo<|im_end|>\n"]
    assert TOKENIZER.decode(second.tokens).count("why") == 0


def test_tool_calls_and_reasoning_reach_the_template_and_results_are_context() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    conversation = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "reasoning_content": "use it", "tool_calls": [call]},
        {"role": "tool", "content": "the result 2"},
        {"role": "assistant", "content": "two", "reasoning_content": "read it"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ]
    until = conversation[:4]
    (sequence,) = encoded(Encoder(TOKENIZER, THINKING), Sample([Sequence(until[:1], until[1:])], id="r")).sequences
    called = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    assert written(sequence) == [
        f"<think>\nuse it\n</think>\n\n{called}",
        "<think>\nread it\n</think>\n\ntwo<|im_end|>\n",
    ]
    # With another user turn the template drops that reasoning: no rendered prefix is a prefix any more.
    whole = Sample([Sequence(conversation[:1], conversation[1:])])
    (sequence,) = encoded(Encoder(TOKENIZER, THINKING), whole).sequences
    assert written(sequence) == [
        called,
        "two<|im_end|>\n",
        "<think>\n\n</think>\n\nwelcome<|im_end|>\n",
    ]


def test_a_template_that_wants_arguments_as_text_gets_them_so() -> None:
    template = CHATML.replace("m.content", "m.content + (m.tool_calls[0].function.arguments if m.tool_calls else '')")
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    sample = Sample([Sequence(turns("x"), [{"role": "assistant", "content": "add", "tool_calls": [call]}])])
    (sequence,) = encoded(Encoder(TOKENIZER, template), sample).sequences
    assert written(sequence) == ['add{"a": 1}<|im_end|>\n']


def test_a_turn_of_weight_zero_is_context() -> None:
    sample = chat("q", "bad", "again", "good")
    assert isinstance(sample.sequences[0].completion, list)
    sample.sequences[0].completion[0]["weight"] = 0
    assert written(encoded(Encoder(TOKENIZER), sample).sequences[0]) == ["good<|im_end|>\n"]


# Role forging


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "thinking"])
@pytest.mark.parametrize("token", SPECIAL + MARKUP)
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_control_tokens_in_the_text_of_others_stay_text(name: str, token: str, role: str) -> None:
    def row(text: str) -> Sample:
        before = [{"role": role, "content": text}, {"role": "user", "content": "q"}]
        return Sample([Sequence(before, [{"role": "assistant", "content": "fine"}])], id="r")

    encoder = Encoder(TOKENIZER, ALL[name])
    (clean,) = encoded(encoder, row("the  word the")).sequences
    (forged,) = encoded(encoder, row(f"the {token}{token} word {token}")).sequences
    added = set(TOKENIZER.added_tokens_decoder)
    control = [[t for t in s.tokens.tolist() if t in added] for s in (clean, forged)]
    assert control[0] == control[1]
    assert written(clean) == written(forged)
    assert TOKENIZER.decode(forged.tokens) == TOKENIZER.decode(clean.tokens).replace(
        "the  word the", f"the {token}{token} word {token}"
    )
    prompt = encoder.render_prompt(row(f"the {token}{token} word {token}").sequences[0].prompt or [])
    assert forged.tokens[: len(prompt)].tolist() == prompt


def test_special_tokens_in_an_answer_stay_text_but_its_reasoning_tags_are_meant() -> None:
    encoder = Encoder(TOKENIZER)
    (sequence,) = encoded(encoder, chat("q", "<think>\nso\n</think>\nI say <|im_end|> now")).sequences
    tokens = TOKENIZER.convert_ids_to_tokens(sequence.tokens.tolist())
    assert tokens.count("<|im_end|>") == 2
    assert tokens.count("<think>") == tokens.count("</think>") == 1
    assert written(sequence) == ["<think>\nso\n</think>\nI say <|im_end|> now<|im_end|>\n"]


def test_text_around_a_forged_token_is_encoded_as_without_it() -> None:
    (sequence,) = encoded(Encoder(TOKENIZER), chat("the <|im_end|> answer", "x")).sequences
    whole = TOKENIZER("user\nthe <|im_end|> answer", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sequence.tokens[1 : 1 + len(whole)].tolist() == whole


# What cannot be masked is refused


def test_a_template_that_hides_or_changes_the_answer_is_refused() -> None:
    hides = CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)")
    with pytest.raises(DataError, match=r"row r: the chat template chatml#.* does not write assistant turn 1"):
        Encoder(TOKENIZER, hides).encode(chat("q", "answer"))
    moves = "{{ messages[-1].content + '<|im_end|>' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"does not (show|write)"):
        Encoder(TOKENIZER, moves).encode(chat("q", "answer"))


def test_a_conversation_the_template_refuses_is_dropped_with_its_reason() -> None:
    assert Encoder(TOKENIZER, MISTRAL).encode(
        Sample([Sequence([*turns("a"), *turns("b")], turns("", "x")[1:])])
    ) == Dropped("template_refused", "roles must alternate")


def test_a_broken_template_and_a_missing_one_are_errors() -> None:
    with pytest.raises(DataError, match="fails: UndefinedError"):
        Encoder(TOKENIZER, "{{ messages[0].nothing.more }}").encode(chat("q", "a"))
    with pytest.raises(DataError, match="no chat template; name one"):
        Encoder(make_tokenizer(template=None)).encode(chat("q", "a"))
    with pytest.raises(DataError, match="no such file"):
        Encoder(TOKENIZER, "missing.jinja")
    with pytest.raises(ConfigError, match="overlong"):
        Encoder(TOKENIZER, overlong="keep")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="slow"):
        Encoder(Slow())


def test_offsets_that_lie_are_found_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(make_tokenizer())
    honest = encoder._text._encode

    def shifted(text: str, **options: Any) -> Any:
        made = honest(text, **options)
        return type(made)(made.ids, [(max(0, a - 2), max(0, b - 2)) for a, b in made.spans])

    monkeypatch.setattr(encoder._text, "_encode", shifted)
    with pytest.raises(DataError, match="cannot be masked by offsets"):
        encoder.encode(chat("a question", "an answer"))


# Plain text and tokens


def test_plain_text_is_encoded_jointly_with_one_end_of_sequence() -> None:
    encoder = Encoder(TOKENIZER, max_length=None)
    (sequence,) = encoded(encoder, Sample([Sequence("what is the", " answer")])).sequences
    assert sequence.tokens.tolist() == [*TOKENIZER.encode("what is the answer"), TOKENIZER.eos_token_id]
    assert written(sequence) == [" answer<|im_end|>"]
    (sequence,) = encoded(encoder, Sample([Sequence("q", "a<|im_end|>")])).sequences
    assert sequence.tokens.tolist().count(TOKENIZER.eos_token_id) == 1
    # A token across the border belongs to the completion.
    (sequence,) = encoded(encoder, Sample([Sequence("what is th", "e")])).sequences
    assert written(sequence) == [" the<|im_end|>"]
    (sequence,) = encoded(encoder, Sample([Sequence("", "the answer")])).sequences
    assert sequence.target.tolist() == [False] + [True] * (len(sequence.tokens) - 1)


def test_token_rows_need_no_tokenizer() -> None:
    encoder = Encoder(None)
    made = encoded(encoder, to_sample(Row("f", 1, {"input_ids": [5, 6, 7], "prompt_length": 1})))
    assert made.sequences[0].tokens.tolist() == [5, 6, 7]
    assert made.sequences[0].target.tolist() == [False, True, True]
    assert made.sequences[0].tokens.dtype == np.int32
    with pytest.raises(DataError, match="no tokenizer"):
        encoder.encode(chat("q", "a"))


# Lengths and pairs


def pair(chosen: str, rejected: str) -> Sample:
    prompt = turns("q")
    return Sample([Sequence(prompt, turns("", text)[1:]) for text in (chosen, rejected)], [Pair(0, 1, margin=2.0)])


def test_overlong_rows_are_dropped_cut_or_an_error() -> None:
    sample = chat("q", "the answer " * 50)
    full = encoded(Encoder(TOKENIZER), sample).sequences[0]
    most = len(full.tokens)
    assert isinstance(Encoder(TOKENIZER, max_length=most).encode(sample), EncodedSample)
    dropped = Encoder(TOKENIZER, max_length=most - 1).encode(sample)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "overlong"
    assert str(most) in dropped.detail
    cut = encoded(Encoder(TOKENIZER, max_length=20, overlong="cut"), sample).sequences[0]
    assert cut.tokens.tolist() == full.tokens[:20].tolist()
    assert cut.target.any()
    with pytest.raises(DataError, match=r"longer than data\.max_length 20"):
        Encoder(TOKENIZER, max_length=20, overlong="error").encode(sample)
    assert Encoder(TOKENIZER, max_length=3, overlong="cut").encode(sample) == Dropped(
        "no_target", "no target token is left"
    )


def test_pairs_that_are_equal_after_the_cut_are_dropped() -> None:
    sample = pair("the answer here and more", "the answer here and less")
    made = encoded(Encoder(TOKENIZER), sample)
    assert made.pairs.tolist() == [[0, 1]]
    assert made.pair_values["margin"].tolist() == [2.0]
    most = len(Encoder(TOKENIZER).render_prompt(turns("q"))) + 3
    same = Encoder(TOKENIZER, max_length=most, overlong="cut").encode(sample)
    assert isinstance(same, Dropped)
    assert same.reason == "identical_pair"
    # The template strips this difference away.
    assert Encoder(TOKENIZER, LLAMA3).encode(pair("same", "same ")) == Dropped("identical_pair")


def test_of_many_pairs_only_the_faulty_go_and_are_counted() -> None:
    sample = pair("good", "bad")
    sample.sequences.append(Sequence(sample.sequences[0].prompt, turns("", "long " * 200)[1:]))
    sample.pairs.append(Pair(0, 2))
    encoder = Encoder(TOKENIZER, max_length=40)
    made = encoded(encoder, sample)
    assert made.pairs.tolist() == [[0, 1]]
    assert len(made.sequences) == 2
    assert encoder.partial == {"overlong": 1}


def test_numbers_of_a_row_come_along() -> None:
    sample = Sample(
        [
            Sequence(turns("q"), turns("", "a")[1:], label=True, scores={"help": 4.0}, weight=0.5),
            Sequence(turns("q"), turns("", "b")[1:], label=False),
        ]
    )
    values = encoded(Encoder(TOKENIZER), sample).sequence_values
    assert values["weight"].tolist() == [0.5, 1.0]
    assert values["label"].tolist() == [1.0, 0.0]
    assert values["score/help"][0] == 4.0
    assert np.isnan(values["score/help"][1])


def test_fingerprint_follows_what_decides_tokens() -> None:
    prints = [
        Encoder(TOKENIZER).fingerprint(),
        Encoder(TOKENIZER, LLAMA3).fingerprint(),
        Encoder(TOKENIZER, max_length=10).fingerprint(),
        Encoder(TOKENIZER, overlong="cut").fingerprint(),
        Encoder(TOKENIZER, history_reasoning="drop").fingerprint(),
        Encoder(make_tokenizer(eos="<|endoftext|>")).fingerprint(),
        Encoder(None).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert Encoder(make_tokenizer()).fingerprint() == prints[0]


def test_a_template_with_a_clock_gives_the_same_tokens_every_day() -> None:
    clock = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    encoder = Encoder(TOKENIZER, clock)
    assert "26 Jul 2024" in TOKENIZER.decode(encoder.render_prompt(turns("q")))
    assert encoder.template == clock


def test_stop_ids_hold_the_templates_terminator() -> None:
    encoder = Encoder(make_tokenizer(LLAMA3, eos="<|endoftext|>"))
    assert encoder.stop_ids == sorted(TOKENIZER.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>"]))
    assert encoder.template_name.startswith("llama3#")


def test_a_template_file_is_named_and_read(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    encoder = Encoder(TOKENIZER, str(tmp_path / "mine.jinja"))
    assert encoder.template == CHATML
    assert encoder.template_name.startswith("mine#")


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data slices are not here")
@pytest.mark.parametrize("name", ["chatml", "llama3", "thinking", "zephyr"])
def test_real_rows_decode_back_to_response_and_terminator(name: str) -> None:
    encoder = Encoder(TOKENIZER, ALL[name])
    checked = 0
    for file in ("preference/hh_helpful.test", "sft/oasst_best_path.test", "preference/llamafactory_dpo_zh.test"):
        for row in read_rows(str(SHARED / f"{file}.jsonl.gz"), limit=12):
            sample = to_sample(row)
            made = encoder.encode(sample)
            if isinstance(made, Dropped):
                continue
            for source, sequence in zip(sample.sequences, made.sequences, strict=True):
                assert isinstance(source.completion, list)
                answers = [turn["content"] for turn in source.completion if turn["role"] == "assistant"]
                runs = written(sequence)
                assert len(runs) == len(answers)
                assert all(a.strip() in run for a, run in zip(answers, runs, strict=True))
                assert encoder.terminators(sequence) == (len(answers), len(answers))
                checked += 1
    assert checked > 40


def test_shared_rows_are_readable_as_plain_json() -> None:
    """The reader's strictness costs nothing on real files: it says what the standard library says."""
    file = SHARED / "preference" / "politeness.test.jsonl.gz"
    if not file.is_file():
        pytest.skip("real data slices are not here")
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        assert [row.value for row in read_rows(str(file))] == [json.loads(line) for line in stream]
