"""``model=tiny``: a Llama of about 1.1M parameters and its tokenizer, made by code; nothing is downloaded.

The tokenizer has one token for each of the 256 bytes, so it encodes every text and decodes it back, and one for each
of a few words.  No word holds a digit: every digit is a token.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, LAYERS, HEADS, INTERMEDIATE, POSITIONS = 192, 2, 6, 576, 1024
INIT_STD = 0.04
"""Twice the usual: at this width it learns the world in fewer steps."""

BOS, EOS, PAD, START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
SPECIAL = (PAD, BOS, START, EOS)

WORDS = """
 user assistant system tool \n
 Tom Ben Sam Max Ann Eva Mia Lea He She I The You How That Try
 apples books cards coins nuts pens shells stamps
 buys finds gets wins drops gives away loses sells
 has some many now is not so told again answer unknown cannot say how a number missing did use the numbers as
 Steps Phrasing Honesty Correctness
 No Unknown
 + - = , . : ?
"""
"""Tokens longer than a byte, each with and without a space before it; punctuation only with."""

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\nTools:\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' }}
{{- (call.function if call.function is defined else call) | tojson }}{{ '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""ChatML.  An assistant turn ends with the terminator and a newline; both are targets."""


def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-complete tokenizer of ``tiny``, always the same; a few hundred tokens, special ones first."""
    space = "Ġ"  # how a byte-level alphabet writes a space
    words = WORDS.split()
    pieces = sorted({space + word for word in words} | {word for word in words if len(word) > 1})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Unigram takes the best-scoring split: any piece beats the bytes it stands for.
    scored = [*[(token, 0.0) for token in SPECIAL], *[(byte, -10.0) for byte in alphabet], *[(p, -1.0) for p in pieces]]
    core = Tokenizer(models.Unigram(scored, unk_id=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def config(vocab_size: int) -> LlamaConfig:
    """The shape of ``tiny`` for a vocabulary; token ids as :func:`tokenizer` gives them."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=INIT_STD,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
    )


def load(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model (fp32, untrained, on the CPU) and tokenizer; the weights depend on ``seed`` alone.

    The caller's random state is left as it was.
    """
    made = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(len(made)))
    model.generation_config = GenerationConfig(
        pad_token_id=made.pad_token_id, bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id
    )
    return model, made
