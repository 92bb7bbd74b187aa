"""Soft prompts inside a model, for engines that take text alone.

The virtual tokens become special tokens of the vocabulary, which the chat template writes before a
conversation.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from transformers import AddedToken

from pujax.errors import ChatError
from pujax.files.chat import Chat, Message
from pujax.files.locate import at_home
from pujax.files.soft_prompt import load_soft_prompt, require_fit
from pujax.models.parameters import DecoderConfig
from pujax.models.soft_prompt import with_rows
from pujax.types import Params

_LEADS = "{% set soft_prompts = "  # how a chat template begins that writes them


def require_plain(chat: Chat) -> None:
    """Raise `ChatError` for a model with soft prompts in it, which takes no other before them."""
    if _LEADS in str(chat.tokenizer.chat_template):
        raise ChatError(
            f"{chat.source}: has soft prompts in it: give all of them to the model without any"
        )


def load_users(
    users: Mapping[str, str], model: DecoderConfig, source: object
) -> dict[str, Float[np.ndarray, "N D"]]:
    """The virtual tokens of each user's file, for the model at `source`.

    Raises `WeightsError`, also where they don't fit.
    """
    read = {}
    for name, path in users.items():
        read[name], about = load_soft_prompt(at_home(path))
        require_fit(path, read[name], about, model, source)
    return read


def led_model(
    config: DecoderConfig,
    params: Params,
    chat: Chat,
    users: Mapping[str, Float[np.ndarray, "N D"]],
) -> tuple[DecoderConfig, Params, Chat]:
    """A model as any engine loads it that answers as this one does with a soft prompt.

    `users` has the virtual tokens of each. One user's lead every conversation. Of several one is
    chosen by name, as the chat template's variable `soft_prompt`, and none leads where none is
    chosen. Raises `ChatError` where the tokenizer or the template can't say it.
    """
    require_plain(chat)
    tokenizer = copy.deepcopy(chat.tokenizer)
    if re.search(r"\bsoft_prompts?\b", str(tokenizer.chat_template)):
        raise ChatError(
            f"{chat.source}: its chat template has a variable soft_prompt, by which a user is to "
            "be chosen: rename that one"
        )
    leads: dict[str, list[str]] = {}
    ids: list[int] = []
    for name, vectors in users.items():
        leads[name] = [f"<|{name}_{i}|>" for i in range(len(vectors))]
        added = [AddedToken(token, normalized=False, special=True) for token in leads[name]]
        if tokenizer.add_tokens(added, special_tokens=True) < len(added):
            raise ChatError(
                f"{chat.source}: has tokens called as those of {name} would be, {leads[name][0]}: "
                "rename that soft prompt's file"
            )
        known = tokenizer.get_added_vocab()
        ids += [known[token] for token in leads[name]]
    bos = None if config.bos_id is None else str(tokenizer.convert_ids_to_tokens(config.bos_id))
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {key: _led(text, leads, bos) for key, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _led(templates, leads, bos)
    grown, tables = with_rows(config, params, np.concatenate(list(users.values())), ids)
    # Of another source: written over that model's directory it is not the same model.
    source = f"{chat.source} led by {', '.join(users)}"
    made = replace(chat, tokenizer=tokenizer, vocab=grown.vocab, source=source)
    _check_led(chat, made, leads, config)
    return grown, tables, made


def _led(template: str, leads: Mapping[str, Sequence[str]], bos: str | None) -> str:
    """A chat template that writes one of `leads` before what `template` does, but behind its BOS.

    It is plain Jinja, as llama.cpp's own engine reads it too.
    """
    said = {name: "".join(tokens) for name, tokens in leads.items()}
    known = json.dumps(f"soft_prompt: choose one of {', '.join(said)}", ensure_ascii=False)
    default = json.dumps(next(iter(said)), ensure_ascii=False) if len(said) == 1 else "none"
    behind = json.dumps(bos or "", ensure_ascii=False)
    # The empty texts keep the spaces at both ends, which a block beside them would take away.
    return (
        f"{_LEADS}{json.dumps(said, ensure_ascii=False)} %}}"
        f"{{% if soft_prompt is not defined %}}{{% set soft_prompt = {default} %}}{{% endif %}}"
        f"{{% set whole %}}{{{{ '' }}}}{template.removesuffix(chr(10))}{{{{ '' }}}}{{% endset %}}"
        "{% if soft_prompt is none %}{{ whole }}"
        f"{{% elif soft_prompt not in soft_prompts %}}{{{{ raise_exception({known}) }}}}"
        f"{{% elif whole.startswith({behind}) %}}"
        f"{{{{ {behind} + soft_prompts[soft_prompt] + whole[{len(bos or '')}:] }}}}"
        "{% else %}{{ soft_prompts[soft_prompt] + whole }}{% endif %}"
    )


def _check_led(
    chat: Chat, made: Chat, leads: Mapping[str, Sequence[str]], config: DecoderConfig
) -> None:
    """Hold the prompts of the model that was made against those that `generate` leads."""
    user = {"role": "user", "content": "Q\n1"}
    turns: list[list[Message]] = [
        [user],
        [{"role": "system", "content": "S"}, user],
        [user, {"role": "assistant", "content": "A"}, user],
    ]
    known = made.tokenizer.get_added_vocab()
    for messages in turns:
        try:
            plain = chat.render(messages)
        except ChatError:
            if messages is turns[0]:
                raise
            continue  # a template that knows no system message, say
        start = 1 if plain[0] == config.bos_id else 0
        for name, tokens in leads.items():
            text = made.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, soft_prompt=name
            )
            if str(text).replace("".join(tokens), "", 1) != chat.render_text(messages):
                raise ChatError(
                    f"{chat.source}: its chat template writes other spaces where it stands behind "
                    "virtual tokens: take the spaces at its beginning away"
                )
            virtual = [known[token] for token in tokens]
            if made.encode(str(text)) != [*plain[:start], *virtual, *plain[start:]]:
                raise ChatError(
                    f"{chat.source}: behind virtual tokens its tokenizer cuts a prompt otherwise, "
                    "so no engine would answer as with them: use `pujax generate` or `chat`"
                )
