"""The tokenizers of GGUF files."""

import math
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
from pujax.files import gguf

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # GGUF's kinds of tokens

PROBE = "I'LL've 12345 été, don't\n\n\n  x = y+1;\t\tπ≈3.14159 你好世界 😀 'tis  end \r\n"

# ---------------------------------------------------------------------- GGUF tokenizers

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


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits,
    "qwen2": lambda: _words(_QWEN2),
    "llama-bpe": lambda: _words(_LLAMA3),
}


def tokenizer_of(file: gguf.GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata, as its maker's tokenizer.json has it."""
    metadata = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    kind = metadata.get("model")
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(str(kind))
    if build is None:
        raise ChatError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not known: put the model's "
            "tokenizer.json into a Hugging Face directory"
        )
    backend = build(file, metadata)
    tokens, kinds = metadata["tokens"], metadata["token_type"]
    # Together, by kind: one by one each would rebuild the whole matcher.
    backend.add_special_tokens(_added(tokens, kinds, CONTROL, special=True))
    backend.add_tokens(_added(tokens, kinds, USER_DEFINED, special=False))

    def named(key: str) -> str | None:
        index = metadata.get(f"{key}_token_id")
        return None if index is None else tokens[index]

    bos = named("bos")
    if metadata.get("add_bos_token", kind == "llama") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        bos_token=bos,
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=named("unknown"),
        clean_up_tokenization_spaces=False,
    )


def _added(tokens: list[str], kinds: list[int], kind: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, its_kind in zip(tokens, kinds, strict=True)
        if its_kind == kind
    ]


def _byte_level(file: gguf.GgufFile, metadata: dict[str, Any]) -> Tokenizer:
    """GPT-2's byte-level BPE with the model's own way to cut text into words."""
    pre = metadata.get("pre")
    if pre not in PRE_TOKENIZERS:
        raise ChatError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not known (only "
            f"{sorted(PRE_TOKENIZERS)}): put the model's tokenizer.json into a directory"
        )
    vocab = {
        token: i
        for i, (token, kind) in enumerate(
            zip(metadata["tokens"], metadata["token_type"], strict=True)
        )
        # Rows that only pad the matrix to a round size are no tokens.
        if not (kind == UNUSED and token == f"[PAD{i}]")
    }
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(file: gguf.GgufFile, metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Gemma); merges follow from the pieces' scores."""
    kinds = metadata["token_type"]
    # Files spell runs of spaces as spaces; the tokenizer sees them normalised.
    metadata["tokens"] = [
        token.replace(" ", "▁") if kind == USER_DEFINED else token
        for token, kind in zip(metadata["tokens"], kinds, strict=True)
    ]
    vocab = {token: i for i, token in enumerate(metadata["tokens"])}
    prefix = metadata.get("add_space_prefix", True)
    backend = Tokenizer(
        BPE(
            vocab,
            _merges(metadata["tokens"], metadata["scores"], kinds, vocab),
            unk_token=metadata["tokens"][metadata["unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    if not prefix:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


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


def scores_of(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make a SentencePiece tokenizer merge in the order of `merges`."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, 0)) for token in tokens]
