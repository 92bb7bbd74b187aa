"""Tokenizer and chat template: messages to token ids and text back, along one path.

`Chat.load` takes the sources of `pujax.files.weights.load`; torch is never needed, and no code
that comes with a model is run.
"""

import ctypes
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pujax.errors import ChatError
from pujax.files import gguf, tokenizers
from pujax.files.durable import on_disk, write_whole
from pujax.files.locate import locate
from pujax.files.safetensors import read_settings
from pujax.types import Frames

Message = dict[str, str]
"""One turn: `role` (system, user or assistant) and `content`."""

REFERENCE = "{x}\n\nHere is a reference answer:\n{a}\n\nAnswer the question in your own words."

JUDGE = (
    "{x}\n\nHere is a reference answer:\n{a}\n\nHere is another answer:\n{y}\n\n"
    "Rate the other answer from 1 (bad) to 5 (as good as the reference answer). "
    "Reply with one digit."
)

LONGEST = 10.0  # seconds that a template may take for one conversation; a thousandth is usual

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
        local = locate(path, tensors=False)
        if local.is_file():
            return cls.from_gguf(gguf.read(local))
        tokenizer = _from_directory(local)
        settings = read_settings(local)
        eos = settings.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        vocab = settings.get("vocab_size", len(tokenizer))
        _check_vocab(local, tokenizer, vocab)
        return _checked(cls(tokenizer, os.fspath(path), _endings(local, tokenizer, eos), vocab))

    @classmethod
    def from_gguf(cls, file: gguf.GgufFile) -> "Chat":
        """The chat in a GGUF file's metadata. Raises `ChatError` for an unknown tokenizer."""
        tokenizer = tokenizers.from_gguf(file)
        endings = _endings(file.path, tokenizer, list(file.eos_ids()))
        return _checked(cls(tokenizer, str(file.path), endings, len(file.vocabulary()[0])))

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
        return _rendered(self.tokenizer, self.source, messages, add_generation_prompt)

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
        middle, found, judge_tail = rest.partition("{y}")
        if not found:
            raise self._changed()
        return Frames(
            reference_tail=np.array(self.encode(reference_tail), np.int32),
            judge_middle=np.array(self.encode(middle), np.int32),
            judge_tail=np.array(self.encode(judge_tail), np.int32),
            # The last id: some tokenizers open every text with a token for the space before it.
            rating_ids=np.array([self._digit(digit) for digit in "12345"], np.int32),
        )

    def _digit(self, digit: str) -> int:
        ids = self.encode(digit)
        if not ids:
            raise ChatError(f"{self.source}: the tokenizer has no token for {digit}: use another")
        return ids[-1]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer and its chat template so that `AutoTokenizer` loads them.

        Raises `DiskError`.
        """
        with on_disk(Path(directory)):
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
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text.encode("utf-8", "surrogatepass"))

    def to_gguf(self) -> dict[str, Any]:
        """The tokenizer as GGUF metadata. Raises `ChatError` where llama.cpp has no name for it."""
        return tokenizers.to_gguf(
            self.tokenizer, source=self.source, vocab=self.vocab, eos_id=self.eos_ids[0]
        )

    def _split(self, before: Sequence[Message], content: str) -> tuple[str, str]:
        """The rendered text on both sides of the last "{a}" in the user's `content`."""
        text = self.render_text([*before, {"role": "user", "content": content}])
        head, found, tail = text.rpartition("{a}")
        if not found:
            raise self._changed()
        return head, tail

    def _changed(self) -> ChatError:
        return ChatError(
            f"{self.source}: the chat template drops or changes what the user says, so no "
            "reference answer can be shown: use a template for plain text"
        )

    def _ids(self, text: str, *, specials_are_text: bool) -> list[int]:
        backend = self.tokenizer.backend_tokenizer
        # The backend remembers this choice from call to call, so every call makes it.
        backend.encode_special_tokens = specials_are_text
        ids = _encoded(self.tokenizer, self.source, text)
        if ids and max(ids) >= self.vocab:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ChatError(
                f"{self.source}: token {token!r} ({max(ids)}) lies outside of the model's "
                f"vocabulary of {self.vocab}: take it out of the text"
            )
        return ids


def _from_directory(directory: Path) -> PreTrainedTokenizerFast:
    try:
        # Said outright: unsaid, transformers asks on standard input whether to run foreign code.
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # what a damaged file makes the libraries raise is their own
        raise ChatError(
            f"{directory}: no tokenizer to be had ({_line(error)}): it needs tokenizer.json and "
            "tokenizer_config.json, and no code of its own"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ChatError(f"{directory}: the tokenizer has no tokenizer.json: save it as a fast one")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _encoded(tokenizer: PreTrainedTokenizerFast, source: str, text: str) -> list[int]:
    try:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError as error:  # half a pair of surrogates, which UTF-8 can't hold
        raise ChatError(f"text that is not Unicode: {ascii(text)[:80]}: mend it") from error
    except Exception as error:  # the library has no type of its own for a damaged vocabulary
        raise ChatError(
            f"{source}: the tokenizer can't take {ascii(text)[:80]} ({_line(error)}): mend it"
        ) from error


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
    if _template(tokenizer, str(source)):
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            text = _rendered(tokenizer, str(source), turns, False)
        except _Endless:
            raise
        except ChatError:
            text = ""  # a template that refuses this much is refused when it is used
        after = text.rpartition("ANSWER")[2]
        ids = _encoded(tokenizer, str(source), after)
        known = [*(i for i in ids if i in known), *known]
    return tuple(dict.fromkeys(known))


# ---------------------------------------------------------------------- templates


def _template(tokenizer: PreTrainedTokenizerFast, source: str) -> str | None:
    """The chat template, the default one where there are several."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise ChatError(
            f"{source}: of its chat templates {', '.join(sorted(template))} none is called "
            "default: name one so"
        )
    return template["default"]


def _rendered(
    tokenizer: PreTrainedTokenizerFast, source: str, messages: Sequence[Message], prompted: bool
) -> str:
    template = _template(tokenizer, source)
    if not template:
        raise ChatError(
            f"{source}: the tokenizer has no chat template: use the model's instruct version, or "
            "put a chat_template.jinja beside its tokenizer.json"
        )
    try:
        with _at_most(LONGEST):
            text = tokenizer.apply_chat_template(
                list(messages),
                chat_template=_dated(template),
                tokenize=False,
                add_generation_prompt=prompted,
            )
    except TimeoutError as error:
        raise _Endless(
            f"{source}: the chat template takes more than {LONGEST:g} s for one conversation: mend "
            "its loops, or use another"
        ) from error
    except Exception as error:  # a template is a program: it may raise anything
        raise ChatError(f"{source}: the chat template refuses this: {_line(error)}") from error
    assert isinstance(text, str)
    return text


class _Endless(ChatError):
    """A template that was stopped: it is not worth another try."""


_UNTIL: dict[int, float] = {}  # by thread, when what it renders must be done
_LOCK = threading.Lock()


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` within the block, in any thread, when it takes longer.

    One call into C is not interrupted. Jinja's sandbox bounds one range, not loops inside loops.
    """
    _watched()
    thread = threading.get_ident()
    try:
        _UNTIL[thread] = time.monotonic() + seconds
        yield
    finally:
        _UNTIL.pop(thread, None)  # first: what comes next could be interrupted
        with _LOCK:
            _raise_in(thread, None)  # what has been asked for and not been raised yet


@lru_cache
def _watched() -> None:
    """Have one thread look after all that render: one for each would take longer than rendering."""

    def watch() -> None:
        while True:
            time.sleep(0.5)
            for thread, until in list(_UNTIL.items()):
                with _LOCK:
                    if time.monotonic() > until and _UNTIL.get(thread) == until:
                        _raise_in(thread, TimeoutError)

    threading.Thread(target=watch, daemon=True).start()


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Have a thread raise `error` at its next line; with None, have it forget that."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


def _checked(chat: Chat) -> Chat:
    """`chat`, with what is odd about its template said once."""
    template = _template(chat.tokenizer, chat.source)
    if not template:
        return chat
    if _NOW in template:
        _say(
            f"{chat.source}: the chat template writes today's date into prompts: tokens are not "
            "those of another day"
        )
    try:
        opened = chat.render_text([{"role": "user", "content": "Q"}])
    except _Endless:
        raise
    except ChatError:
        return chat  # refused when it is used
    if re.search(r"<think>\s*$", opened):
        _say(
            f"{chat.source}: the chat template opens <think> before the answer, so answers without "
            "a thought are trained as thoughts: use a template that does not"
        )
    return chat


_NOW = "strftime_now"

_CODES = [f"%-{code}" for code in "dmHIMSjy"] + [
    f"%{code}" for code in "aAbBcdfHIjmMpSxXyYZzFTDeu%"
]


@lru_cache
def _dated(template: str) -> str:
    """The template with one date for as long as the process lives.

    A day that ends during a run would otherwise change its prompts. Templates see plain data
    alone, so what they call is replaced by a macro that knows each code's value.
    """
    if _NOW not in template:
        return template
    values = {code: datetime.now().strftime(code) for code in _CODES}
    filled = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items())
    # The newline is dropped with the tag, so that the template still starts a line.
    return f"{{% macro {_NOW}(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


@lru_cache
def _say(text: str) -> None:
    """Tell the user, once in a process."""
    print(f"pujax: {text}", file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
