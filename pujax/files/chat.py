"""Tokenizer and chat template: messages to token ids and text back, along one path.

`Chat.load` takes the sources of `pujax.files.weights.load`. A GGUF file's tokenizer is rebuilt
from its metadata with the `tokenizers` library; torch is never needed.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pujax.errors import ChatError
from pujax.files import gguf
from pujax.files.locate import locate
from pujax.files.tokenizers import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PROBE,
    UNUSED,
    USER_DEFINED,
    scores_of,
    tokenizer_of,
)
from pujax.files.weights import gguf_eos_ids, hf_settings
from pujax.types import Frames

Message = dict[str, str]
"""One turn: `role` (system, user or assistant) and `content`."""

REFERENCE = "{x}\n\nHere is a reference answer:\n{a}\n\nAnswer the question in your own words."

JUDGE = (
    "{x}\n\nHere is a reference answer:\n{a}\n\nHere is another answer:\n{y}\n\n"
    "Rate the other answer from 1 (bad) to 5 (as good as the reference answer). "
    "Reply with one digit."
)

_SLACK = 0.1  # of the model's vocabulary: rows that pad it beyond the tokenizer's


@dataclass(frozen=True)
class Chat:
    """A model's tokenizer and chat template.

    `eos_ids` are all the ids that end a response, the one that ends an assistant's turn first.
    `vocab` is the size of the model's vocabulary, which may be padded beyond the tokenizer's.
    """

    tokenizer: PreTrainedTokenizerFast
    source: str
    eos_ids: tuple[int, ...]
    vocab: int

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Chat":
        """The chat of the model at `path`: a hub id, a directory, a GGUF file, package://...

        Raises `ChatError` where there is no tokenizer or it is of another model.
        """
        local = locate(path)
        if local.is_file():
            return cls.from_gguf(gguf.read(local))
        tokenizer = _from_directory(local)
        settings = hf_settings(local)
        eos = settings.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        vocab = settings.get("vocab_size", len(tokenizer))
        _check_vocab(local, tokenizer, vocab)
        return cls(tokenizer, os.fspath(path), _endings(local, tokenizer, eos), vocab)

    @classmethod
    def from_gguf(cls, file: gguf.GgufFile) -> "Chat":
        """The chat in a GGUF file's metadata. Raises `ChatError` for an unknown tokenizer."""
        tokenizer = tokenizer_of(file)
        endings = _endings(file.path, tokenizer, list(gguf_eos_ids(file)))
        return cls(tokenizer, str(file.path), endings, len(file.metadata["tokenizer.ggml.tokens"]))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, as `apply_chat_template` makes them.

        Raises `ChatError` without a chat template, or for a conversation that it refuses.
        """
        ids = self.encode(self.render_text(messages, add_generation_prompt))
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise ChatError(f"{self.source}: the rendered prompt starts with BOS twice")
        return ids

    def render_text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text whose tokens `render` returns."""
        if not self.tokenizer.chat_template:
            raise ChatError(
                f"{self.source}: the tokenizer has no chat template: use the model's instruct "
                "version, or put a chat_template.jinja beside its tokenizer.json"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"{self.source}: the chat template refuses this: {error}") from error
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of text as it stands; names of special tokens in it become those tokens."""
        return self._ids(text, specials_are_text=False)

    def encode_response(self, text: str, finished: bool) -> list[int]:
        """Token ids of an assistant's answer, with the EOS that ends its turn when `finished`.

        The name of a special token in it stays plain text: no answer can end its turn early.
        """
        ids = self._ids(text, specials_are_text=True)
        return [*ids, self.eos_ids[0]] if finished else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.backend_tokenizer.decode([int(i) for i in ids])

    def reference_head(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation up to where a reference answer shown to the model begins."""
        if not messages or messages[-1]["role"] != "user":
            raise ChatError("the last message must be the user's, to show a reference answer in it")
        content = REFERENCE.replace("{x}", messages[-1]["content"])
        head, _ = self._split(messages[:-1], content)
        return self.encode(head)

    @cached_property
    def frames(self) -> Frames:
        """The constant pieces of reference and rating prompts."""
        _, reference_tail = self._split([], REFERENCE)
        _, rest = self._split([], JUDGE)
        middle, _, judge_tail = rest.partition("{y}")
        return Frames(
            reference_tail=np.array(self.encode(reference_tail), np.int32),
            judge_middle=np.array(self.encode(middle), np.int32),
            judge_tail=np.array(self.encode(judge_tail), np.int32),
            # The last id: some tokenizers open every text with a token for the space before it.
            rating_ids=np.array([self.encode(digit)[-1] for digit in "12345"], np.int32),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer and its chat template so that `AutoTokenizer` loads them."""
        self.tokenizer.save_pretrained(os.fspath(directory))
        # In words that transformers 4, and so vLLM, reads too; 5 reads both.
        path = Path(directory) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        if settings["tokenizer_class"] == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def gguf_metadata(self) -> dict[str, Any]:
        """The tokenizer in GGUF's words, keys without their "tokenizer.ggml." or "tokenizer.".

        Raises `ChatError` for a tokenizer whose way to cut text into words llama.cpp has no name
        for.
        """
        backend = self.tokenizer.backend_tokenizer
        bpe = json.loads(backend.to_str())["model"]
        if bpe["type"] != "BPE":
            raise ChatError(f"{self.source}: GGUF export of a {bpe['type']} tokenizer is not known")
        merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in bpe["merges"]]
        kind = "llama" if bpe["byte_fallback"] else "gpt2"

        tokens = [f"[PAD{i}]" for i in range(self.vocab)]
        kinds = [UNUSED] * self.vocab
        for token, i in bpe["vocab"].items():
            byte = kind == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token)
            tokens[i], kinds[i] = token, BYTE if byte else NORMAL
        for i, added in self.tokenizer.added_tokens_decoder.items():
            if i < self.vocab:
                tokens[i], kinds[i] = added.content, CONTROL if added.special else USER_DEFINED
                if kind == "llama" and not added.special:
                    tokens[i] = added.content.replace("▁", " ")
        metadata = {"model": kind, "tokens": tokens, "token_type": kinds}
        if kind == "llama":
            first = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
            metadata |= {
                "pre": "default",
                "scores": scores_of(tokens, merges),
                "add_space_prefix": first != "a",
            }
        else:
            metadata |= {
                "pre": self._pre_tokenizer(),
                "merges": [" ".join(pair) for pair in merges],
                "add_space_prefix": False,
            }
        begun = backend.encode("a").ids[0] == self.tokenizer.bos_token_id
        metadata |= {"add_bos_token": begun, "eos_token_id": self.eos_ids[0]}
        for key, i in (
            ("bos", self.tokenizer.bos_token_id),
            ("padding", self.tokenizer.pad_token_id),
            ("unknown", self.tokenizer.unk_token_id),
        ):
            if i is not None:
                metadata[f"{key}_token_id"] = i
        if self.tokenizer.chat_template:
            metadata["chat_template"] = self.tokenizer.chat_template
        return metadata

    def _pre_tokenizer(self) -> str:
        """llama.cpp's name for how this tokenizer cuts text: the one that cuts a probe alike."""
        own = self.tokenizer.backend_tokenizer.pre_tokenizer
        for name, build in PRE_TOKENIZERS.items():
            if own is not None and own.pre_tokenize_str(PROBE) == build().pre_tokenize_str(PROBE):
                return name
        raise ChatError(
            f"{self.source}: llama.cpp's name for this pre-tokenizer is not known (only "
            f"{sorted(PRE_TOKENIZERS)}): export format=hf and convert that with llama.cpp"
        )

    def _split(self, before: Sequence[Message], content: str) -> tuple[str, str]:
        """The rendered text on both sides of the last "{a}" in the user's `content`."""
        text = self.render_text([*before, {"role": "user", "content": content}])
        head, _, tail = text.rpartition("{a}")
        return head, tail

    def _ids(self, text: str, *, specials_are_text: bool) -> list[int]:
        backend = self.tokenizer.backend_tokenizer
        # The backend remembers this choice from call to call, so every call makes it.
        backend.encode_special_tokens = specials_are_text
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ChatError(
                f"{self.source}: token {token!r} ({max(ids)}) lies outside of the model's "
                f"vocabulary of {self.vocab}: take it out of the text"
            )
        return ids


def _from_directory(directory: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ChatError(
            f"{directory}: no tokenizer to be had ({error}): it needs tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ChatError(f"{directory}: the tokenizer has no tokenizer.json: save it as a fast one")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _check_vocab(source: Path, tokenizer: PreTrainedTokenizerFast, vocab: int) -> None:
    """Hold the tokenizer's size against the model's.

    Added tokens may lie beyond the model's vocabulary (Gemma's image token in its text models),
    and the model's may be padded, by up to `_SLACK`.
    """
    base = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if base > vocab or len(tokenizer) < (1 - _SLACK) * vocab:
        raise ChatError(
            f"{source}: the tokenizer holds {len(tokenizer)} tokens but the model's vocabulary "
            f"{vocab}: they are of different models"
        )


def _endings(source: Path, tokenizer: PreTrainedTokenizerFast, eos: list[int]) -> tuple[int, ...]:
    """The EOS ids, that first which the template writes after an assistant's answer."""
    known = [*eos, *(i for i in [tokenizer.eos_token_id] if i is not None)]
    if not known:
        raise ChatError(f"{source}: no EOS id: set eos_token_id in generation_config.json")
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except jinja2.TemplateError:
            text = ""  # a template that refuses this much is refused when it is used
        after = text.rpartition("ANSWER")[2]
        ids = tokenizer.backend_tokenizer.encode(after, add_special_tokens=False).ids
        known = [*(i for i in ids if i in known), *known]
    return tuple(dict.fromkeys(known))
