"""A byte-level tokenizer and a Qwen-like chat template, saved beside a checkpoint."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAINING_TEXT = (
    "Tom has three apples and buys four more. How many apples does Tom have?",
    "A train travels sixty miles in one hour; how far does it go in three hours?",
    "日本語 😀 naïve café, 12 + 30 = 42.",
)
TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{- "\\n" }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}
{%- else %}{%- set content = message.content | map(attribute='text') | join('') %}{%- endif %}
{%- if message.role == 'system' and not loop.first %}
{{- raise_exception('System message must be at the beginning.') }}
{%- endif %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}{% continue %}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + content.strip() }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' }}{{ call.function | tojson(indent=2) }}{{ '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- else %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}
"""


def byte_level_tokenizer(vocab_size: int = 300) -> tokenizers.Tokenizer:
    """Trained in the test, on a few lines; ids 0 to 2 are the special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def write_text_files(folder: Path, vocab_size: int = 300) -> Path:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as Qwen checkpoints have them."""
    byte_level_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
