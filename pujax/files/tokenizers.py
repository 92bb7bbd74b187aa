"""Tokenizers in GGUF's words, both ways."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pujax.errors import ChatError
from pujax.files.gguf import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, GgufFile

_TEMPLATE = "tokenizer.chat_template"

_PROBE = "I'LL've 12345 été, don't\n\n\n  x = y+1;\t\tπ≈3.14159 你好世界 😀 'tis  end \r\n"

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits,
    "qwen2": lambda: _words(_QWEN2),
    "llama-bpe": lambda: _words(_LLAMA3),
}


def from_gguf(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata, as its maker's tokenizer.json has it.

    Raises `ChatError` for a kind that isn't known or is not whole, `WeightsError` for none.
    """
    tokens, kinds = file.vocabulary()
    ids = {key: file.token_id(key) for key in ("bos", "eos", "padding", "unknown")}
    kind = file.metadata.get("tokenizer.ggml.model")
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(str(kind))
    if build is None:
        raise ChatError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not known: put the model's "
            "tokenizer.json into a Hugging Face directory"
        )
    if kind == "llama":  # files spell runs of spaces as spaces; the tokenizer sees them normalised
        tokens = [
            token.replace(" ", "▁") if its_kind == USER_DEFINED else token
            for token, its_kind in zip(tokens, kinds, strict=True)
        ]
    backend = build(file, tokens, kinds)
    # Together, by kind: one by one each would rebuild the whole matcher.
    backend.add_special_tokens(_added(tokens, kinds, CONTROL, special=True))
    backend.add_tokens(_added(tokens, kinds, USER_DEFINED, special=False))
    named = {key: None if i is None else tokens[i] for key, i in ids.items()}
    bos = named["bos"]
    if file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_templates(file),
        bos_token=bos,
        eos_token=named["eos"],
        pad_token=named["padding"],
        unk_token=named["unknown"],
        clean_up_tokenization_spaces=False,
    )


def to_gguf(
    tokenizer: PreTrainedTokenizerFast, *, source: str, vocab: int, eos_id: int
) -> dict[str, Any]:
    """The metadata that `from_gguf` makes the tokenizer of, padded to `vocab` tokens.

    Raises `ChatError` naming `source` for a tokenizer whose way to cut text into words llama.cpp
    has no name for.
    """
    backend = tokenizer.backend_tokenizer
    bpe = json.loads(backend.to_str())["model"]
    if bpe["type"] != "BPE":
        raise ChatError(f"{source}: GGUF export of a {bpe['type']} tokenizer is not known")
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in bpe["merges"]]
    kind = "llama" if bpe["byte_fallback"] else "gpt2"

    tokens = [f"[PAD{i}]" for i in range(vocab)]
    kinds = [UNUSED] * vocab
    for token, i in bpe["vocab"].items():
        byte = kind == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i], kinds[i] = token, BYTE if byte else NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < vocab:
            tokens[i], kinds[i] = added.content, CONTROL if added.special else USER_DEFINED
            if kind == "llama" and not added.special:
                tokens[i] = added.content.replace("▁", " ")
    metadata = {"model": kind, "tokens": tokens, "token_type": kinds}
    if kind == "llama":
        first = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
        metadata |= {
            "pre": "default",
            "scores": _scores_of(tokens, merges),
            "add_space_prefix": first != "a",
        }
    else:
        metadata |= {
            "pre": _pre_tokenizer(tokenizer, source),
            "merges": [" ".join(pair) for pair in merges],
            "add_space_prefix": False,
        }
    begun = backend.encode("a").ids[0] == tokenizer.bos_token_id
    metadata |= {"add_bos_token": begun, "eos_token_id": eos_id}
    for key, i in (
        ("bos", tokenizer.bos_token_id),
        ("padding", tokenizer.pad_token_id),
        ("unknown", tokenizer.unk_token_id),
    ):
        if i is not None:
            metadata[f"{key}_token_id"] = i
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return named | _template_keys(tokenizer.chat_template)


def _templates(file: GgufFile) -> str | dict[str, str] | None:
    """The file's chat template, or all of them by name where it has several."""
    named = {
        key.removeprefix(f"{_TEMPLATE}."): template
        for key, template in file.metadata.items()
        if key.startswith(f"{_TEMPLATE}.")
    }
    default = file.metadata.get(_TEMPLATE)
    if default is not None:
        named["default"] = default
    for name, template in named.items():
        if not isinstance(template, str):
            raise ChatError(f"{file.path}: the chat template {name!r} is no text: convert it again")
    return default if set(named) <= {"default"} else named


def _template_keys(templates: str | dict[str, str] | None) -> dict[str, Any]:
    """The keys of one chat template or of several: llama.cpp takes the default unless told."""
    if not isinstance(templates, dict):
        return {_TEMPLATE: templates} if templates else {}
    others = {name: text for name, text in templates.items() if name != "default"}
    keys: dict[str, Any] = {f"{_TEMPLATE}.{name}": text for name, text in others.items()}
    if others:
        keys[f"{_TEMPLATE}s"] = sorted(others)
    return keys | ({_TEMPLATE: templates["default"]} if "default" in templates else {})


def _pre_tokenizer(tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    """llama.cpp's name for how this tokenizer cuts text: the one that cuts a probe alike."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    for name, build in _PRE_TOKENIZERS.items():
        if own is not None and own.pre_tokenize_str(_PROBE) == build().pre_tokenize_str(_PROBE):
            return name
    raise ChatError(
        f"{source}: llama.cpp's name for this pre-tokenizer is not known (only "
        f"{sorted(_PRE_TOKENIZERS)}): export format=hf and convert that with llama.cpp"
    )


def _added(tokens: list[str], kinds: list[int], kind: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _byte_level(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """GPT-2's byte-level BPE with the model's own way to cut text into words."""
    pre = str(file.metadata.get("tokenizer.ggml.pre"))
    if pre not in _PRE_TOKENIZERS:
        raise ChatError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not known (only "
            f"{sorted(_PRE_TOKENIZERS)}): put the model's tokenizer.json into a directory"
        )
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        # Rows that only pad the matrix to a round size are no tokens.
        if not (kind == UNUSED and token == f"[PAD{i}]")
    }
    merges = [tuple(merge.partition(" ")[::2]) for merge in _listed(file, "merges", str)]
    backend = Tokenizer(_bpe(file, vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Gemma); merges follow from the pieces' scores."""
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = _listed(file, "scores", float, len(tokens))
    unknown = file.token_id("unknown")
    choices = {} if unknown is None else {"unk_token": tokens[unknown]}
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = _bpe(
        file,
        vocab,
        _merges(tokens, scores, kinds, vocab),
        fuse_unk=True,
        byte_fallback=True,
        **choices,
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    if not prefix:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _listed(file: GgufFile, key: str, kind: type, count: int | None = None) -> list[Any]:
    """The list under `tokenizer.ggml.KEY`, of `count` entries if given. Raises `ChatError`."""
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if (
        not isinstance(values, list)
        or count not in (None, len(values))
        or not all(isinstance(value, kind) for value in values)
    ):
        raise ChatError(
            f"{file.path}: tokenizer.ggml.{key} is missing or not whole: convert the model again"
        )
    return values


def _bpe(file: GgufFile, vocab: dict[str, int], merges: list[Any], **choices: Any) -> BPE:
    try:
        return BPE(vocab, merges, **choices)
    except Exception as error:  # the library raises nothing more special
        raise ChatError(
            f"{file.path}: its tokens and merges do not fit together ({error}): convert the model "
            "again"
        ) from error


def _merges(
    tokens: list[str], scores: list[float], kinds: list[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best third first (as transformers does)."""
    ranked = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind in (CONTROL, BYTE):
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        local = [(left, right) for left, right in splits if left in vocab and right in vocab]
        local.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        rank = math.inf if kind == USER_DEFINED else score  # whole before any part of it
        ranked += [(left, right, rank) for left, right in local]
    ranked.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in ranked]


def _scores_of(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make a SentencePiece tokenizer merge in the order of `merges`."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, 0)) for token in tokens]
