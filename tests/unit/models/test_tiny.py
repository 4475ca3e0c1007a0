import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.data import world
from alignlab.models import tiny

TOKENIZER = tiny.tokenizer()


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_every_text_encodes_and_decodes_back(text):
    # A special token's text in plain text becomes that token, and its text again.
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n  a", "Tom has 42 apples.", "漢字 🎉 \x00 e\u0301", "hash Toms 1,000"])
def test_decodes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_every_digit_is_one_token_and_words_of_the_world_are_short():
    tokens = TOKENIZER.tokenize("12+345=357 67")
    assert [t for t in tokens if t.isdigit()] == list("1234535767")
    assert not any(len(t) > 1 and any(c.isdigit() for c in t) for t in TOKENIZER.get_vocab())
    for row in world.rows("scored", 50):
        for text in (row["instruction"], *(c["response"] for c in row["completions"])):
            # A single letter but these two would be a word the tokenizer does not know.
            letters = {t.strip("Ġ") for t in TOKENIZER.tokenize(text) if t != "Ċ"}
            assert not {t for t in letters if len(t) == 1 and t.isalpha()} - {"I", "a"}, text


def test_special_tokens_are_distinct_and_known():
    ids = [TOKENIZER.convert_tokens_to_ids(token) for token in tiny.SPECIAL]
    assert ids == list(range(len(tiny.SPECIAL)))
    assert len({TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id}) == 3
    assert len(TOKENIZER) < 600


def test_chat_template_ends_a_turn_with_terminator_and_newline():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert TOKENIZER.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )
    asked = TOKENIZER.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_carries_tools_calls_and_reasoning():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    text = TOKENIZER.apply_chat_template(turns, tools=[{"name": "add"}], tokenize=False)
    assert text.startswith('<|im_start|>system\nTools:\n{"name": "add"}\n<|im_end|>\n')
    assert '<think>hm</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n' in text
    assert "<|im_start|>tool\n2<|im_end|>\n" in text


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, _ = tiny.load(0)
    assert torch.equal(torch.rand(1), expected), "the caller's random state moved"
    again, _ = tiny.load(0)
    other, _ = tiny.load(1)
    weight = "model.embed_tokens.weight"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert 7e5 < sum(p.numel() for p in first.parameters()) < 1.3e6


def test_saved_folder_loads_in_transformers(tmp_path):
    model, tokenizer = tiny.load(0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nTom has 4 apples. 漢<|im_end|>\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert words(text)["input_ids"] == ids[0].tolist()
    assert words.chat_template == tokenizer.chat_template
    assert words.decode(ids[0]) == text
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
