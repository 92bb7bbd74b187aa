"""What is typed as KEY=VALUE arrives as it was typed."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pujax.config.compose import conf_dir, from_hydra, register, structured
from pujax.config.overrides import in_hydra_words
from pujax.config.settings import TrainConfig
from pujax.errors import ConfigError
from pujax.evaluate import EvaluateConfig
from pujax.generate import GenerateConfig

register("train_schema", TrainConfig)
GROUPS = ("model", "loss", "experiment", "suite")


def arrived(text, key="prompt", schema: type = GenerateConfig, *, sweep=False):
    """What a setting holds after `key=text` was typed."""
    (word,) = in_hydra_words([f"{key}={text}"], schema, GROUPS, sweep=sweep)
    (override,) = OverridesParser.create().parse_overrides([word])
    node = structured(schema)
    OmegaConf.update(node, override.key_or_group, override.value())
    return OmegaConf.select(node, key)


@pytest.mark.parametrize(
    "text",
    [
        *("Hello, my screen is broken", "It's me", "Is a=b?", "What is 2+2 (in words)?", "#1"),
        *("two\nlines", "{x}", "[x", "[a,b]", "café", "a: b", "${HOME} and ${", 'say "hi"'),
        *(
            "${a}${a}",
            "${a.b} costs $5",
            "\\${a}",
            "\\\\${a}\\",
            "${oc}",
            "${x:1}",
            "$${",
            "$ {x}",
            "${seed",
        ),
        *(
            "\\",
            "a\\'",
            "a\\",
            "1e3",
            "-5",
            "1_000",
            "true",
            "'a' or 'b'",
            "@x",
            " x ",
            "2026_11_25",
        ),
    ],
)
def test_a_text_arrives_as_it_was_typed(text):
    assert arrived(text) == text
    assert arrived(text, "run.root", TrainConfig) == text


@pytest.mark.parametrize("key", ["prompt", "system"])
def test_what_a_model_reads_refers_to_nothing(key, monkeypatch):
    """A text about settings, or with a shell's variables, which nobody would want replaced."""
    monkeypatch.setenv("PLACE", "here")
    for text in ("${oc.env:PLACE}", "What is ${model} of ${seed}?", "\\${seed}", "${now:%Y}"):
        assert arrived(text, key) == text
        assert arrived(text, "teacher.system", EvaluateConfig) == text


@settings(max_examples=150, deadline=None)
@given(st.text("ab'\"\\,=:[]{}()$ é\n\t@#~😀", min_size=1))
def test_any_text_arrives_as_it_was_typed(text):
    if not (text[0] in "'\"" and text[0] == text[-1] and len(text) > 1):
        assert arrived(text) == text


def test_what_has_quotes_of_its_own_loses_them_and_null_is_none():
    assert arrived("'Hello, you'") == "Hello, you"
    assert arrived('"null"') == "null"
    assert arrived("null") is None


def test_references_to_settings_and_the_environment_are_resolved(monkeypatch):
    monkeypatch.setenv("PLACE", "here, now")
    assert arrived("${oc.env:PLACE}/x", "run") == "here, now/x"
    assert arrived("${oc.env:NONE,${oc.env:PLACE}}", "run") == "here, now"
    assert arrived("of ${max_tokens}", "run") == "of 128"
    assert arrived("\\${max_tokens}", "run") == "${max_tokens}"
    settings = "{dataset: d, template: 'For ${price} in ${run.root}: {x}'}"
    read = arrived(settings, "data.prompts", TrainConfig)
    assert read["template"] == "For ${price} in runs: {x}"


@pytest.mark.parametrize(
    ("key", "schema", "typed", "value"),
    [
        ("data.prompts", TrainConfig, "/home/josé/a b (1).jsonl", "/home/josé/a b (1).jsonl"),
        ("data.prompts", TrainConfig, "[josé.jsonl, k=v.jsonl]", ["josé.jsonl", "k=v.jsonl"]),
        ("data.prompts", TrainConfig, "a, b.jsonl", "a, b.jsonl"),
        ("data.heldout", TrainConfig, "['a,b.jsonl', c.jsonl]", ["a,b.jsonl", "c.jsonl"]),
        ("data.heldout", EvaluateConfig, "Müller, 2026.csv", "Müller, 2026.csv"),
        ("run", EvaluateConfig, "runs/a,b", "runs/a,b"),
        ("data.prompts", TrainConfig, "{dataset: d, split: x}", {"dataset": "d", "split": "x"}),
        ("run.name", TrainConfig, "2026_11_25", "2026_11_25"),
        ("resume", TrainConfig, "runs/lr=1/x", "runs/lr=1/x"),
        ("trusted", TrainConfig, "[a,b]", ["a", "b"]),
        ("run", EvaluateConfig, "[runs/lr=1, runs/2026]", ["runs/lr=1", "runs/2026"]),
        ("run", EvaluateConfig, "1e3", "1e3"),
        ("align.steps", TrainConfig, "3", 3),
        ("teacher.headers.x-title", TrainConfig, "it's (me)", "it's (me)"),
        ("teacher.extra_body.top_p", TrainConfig, "0.5", 0.5),
    ],
)
def test_a_setting_says_whether_its_value_is_a_text(key, schema, typed, value):
    assert arrived(typed, key, schema) == value


def test_groups_and_the_values_of_a_sweep_are_left_to_hydra():
    words = ["+experiment=smoke", "loss=dpo,grpo", "data.system=a,b", "run.name=a, b", "seed=0,1"]
    swept = in_hydra_words(words, TrainConfig, GROUPS, sweep=True)
    assert swept == words
    once = in_hydra_words([words[0], *words[2:]], TrainConfig, GROUPS)
    assert once[:3] == [words[0], "data.system='a,b'", "run.name='a, b'"]
    with pytest.raises(ConfigError, match="loss=dpo,grpo: choose one, or go through them with -m"):
        in_hydra_words(words, TrainConfig, GROUPS)
    assert in_hydra_words(["run.name=a b"], TrainConfig, GROUPS, sweep=True) == ["run.name='a b'"]


def test_a_command_gets_the_texts():
    typed = ["+experiment=smoke", "data.system=Hi, you: (1) é", "run.name=été", "resume=a=b"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        words = in_hydra_words(typed, TrainConfig, GROUPS)
        config = from_hydra(TrainConfig, compose("train", overrides=words))
    assert (config.data.system, config.run.name, config.resume) == (
        "Hi, you: (1) é",
        "été",
        "a=b",
    )


def test_a_choice_beside_a_whole_list_of_them_is_refused_and_not_lost():
    words = ["eval=[exact]", "+eval=[anchors]"]
    with pytest.raises(ConfigError, match=r"^\+eval=\[anchors\]: .* eval=\[exact,anchors\]$"):
        in_hydra_words(words, TrainConfig, [*GROUPS, "eval"])
    assert in_hydra_words(words[1:], TrainConfig, [*GROUPS, "eval"]) == words[1:]
