"""A byte-level tokenizer of 96 tokens, as GGUF has it, and models of that vocabulary."""

from pathlib import Path
from typing import Any

from tiny_families import tiny

from pujax.files import gguf
from pujax.files.chat import Chat

_LETTERS = [chr(i) for i in range(33, 33 + 91)]

TEMPLATE = (
    "{% for turn in messages %}<|im_end|>{{ turn.role }}:{{ turn.content }}<|im_end|>{% endfor %}"
)

VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*_LETTERS, "ab", "<|im_end|>", "<|endoftext|>", "[PAD94]", "[PAD95]"],
    "tokenizer.ggml.token_type": [1] * 92 + [3, 3, 5, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 92,
    "tokenizer.chat_template": TEMPLATE,
}


def toy_file(**changes: Any) -> gguf.GgufFile:
    """Metadata alone; a key of None is left out, and `__` stands for a dot."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in (VOCABULARY | changed).items() if value is not None}
    return gguf.GgufFile(Path("toy.gguf"), metadata, {})


def toy_chat(template: str | dict[str, str] = TEMPLATE) -> Chat:
    """The tokenizer with a chat template of one's own."""
    chat = Chat.from_gguf(toy_file())
    chat.tokenizer.chat_template = template
    return chat


def write_toy(path: Path) -> bytes:
    """A whole GGUF file of a toy Qwen 2 with that tokenizer."""
    config, params = tiny("qwen2")
    gguf.write(path, config, params, VOCABULARY)
    return path.read_bytes()
