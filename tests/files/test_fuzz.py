"""Files of any content: what can't be used is refused in one line, and nothing else comes out."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import TINY, tiny
from toy_gguf import write_toy

from pujax.errors import PujaxError
from pujax.files import gguf, safetensors, tokenizers, weights
from pujax.files.durable import read_jsonl

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def often(slow: Callable[..., Any]) -> Any:
    """A test with few examples, always the same, and under `long` with many."""
    return pytest.mark.parametrize(
        "examples", [25, pytest.param(3000, marks=pytest.mark.long)], ids=["few", "many"]
    )(slow)


def refused_or_read(read: Callable[[], Any], place: str) -> None:
    """`read` returns, or raises a PujaxError of one line that says in which file, and a remedy."""
    try:
        read()
    except PujaxError as error:
        told = str(error)
        assert told.isprintable()
        assert re.search(place, told), told
        assert re.search(r": [^:]+", told), told


def repeated(examples: int, strategy: Any, check: Callable[[Any], None]) -> None:
    settings(max_examples=examples, derandomize=examples < 100, **QUICK)(given(strategy)(check))()


@often
def test_a_config_of_any_values_is_read_or_refused(examples, tmp_path):
    keys = sorted({key for family in TINY.values() for key in family} | {"layer_types"})
    changes = st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3)
    missing = st.lists(st.sampled_from(keys), max_size=1)

    def check(drawn):
        name, changed, left_out = drawn
        config = {k: v for k, v in (TINY[name] | changed).items() if k not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused_or_read(lambda: safetensors.read_config(tmp_path), f"{tmp_path}/config.json")

    repeated(examples, st.tuples(st.sampled_from(list(TINY)), changes, missing), check)


@often
def test_an_index_and_a_generation_config_of_any_values_are_read_or_refused(examples, tmp_path):
    safetensors.save(tmp_path, *tiny("qwen2"))

    def check(drawn):
        placed, eos = drawn
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        refused_or_read(lambda: safetensors.open_model(tmp_path), str(tmp_path))
        refused_or_read(lambda: safetensors.read_settings(tmp_path), "generation_config.json")

    files = st.sampled_from(["model.safetensors", "config.json", "..", "", "/etc/passwd"])
    maps = st.dictionaries(st.text(max_size=4), files | VALUES, max_size=2)
    repeated(examples, st.tuples(maps | VALUES, VALUES), check)


def _read_all(path: Path) -> None:
    weights.load(path)
    tokenizers.from_gguf(gguf.read(path))


@often
def test_a_gguf_file_with_any_bytes_changed_is_read_or_refused(examples, tmp_path):
    whole = write_toy(tmp_path / "whole.gguf")
    weights_begin = min(one.offset for one in gguf.read(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "changed.gguf"

    def check(drawn):
        changes, keep = drawn
        content = bytearray(whole)
        for at, value in changes:
            content[at] = value
        path.write_bytes(content[: int(keep * len(content))])
        refused_or_read(lambda: _read_all(path), str(path))

    at = st.integers(0, weights_begin - 1)
    change = st.tuples(at, st.sampled_from([0, 1, 8, 9, 127, 255]) | st.integers(0, 255))
    changes = st.lists(change, min_size=1, max_size=4)
    repeated(examples, st.tuples(changes, st.just(1.0) | st.floats(0, 1)), check)


@often
def test_a_safetensors_file_with_any_bytes_changed_is_read_or_refused(examples, tmp_path):
    safetensors.save(tmp_path, *tiny("qwen2"))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def check(drawn):
        changes, keep = drawn
        content = bytearray(whole)
        for at, value in changes:
            content[at] = value
        path.write_bytes(content[: int(keep * len(content))])
        refused_or_read(lambda: weights.load(tmp_path), str(tmp_path))

    change = st.tuples(st.integers(0, header - 1), st.integers(0, 255) | st.sampled_from(b'0",[]:'))
    changes = st.lists(change, min_size=1, max_size=3)
    repeated(examples, st.tuples(changes, st.just(1.0) | st.floats(0, 1)), check)


@often
def test_gguf_keys_of_any_values_are_read_or_refused(examples, tmp_path):
    write_toy(tmp_path / "whole.gguf")
    file = gguf.read(tmp_path / "whole.gguf")
    values = SCALARS | st.lists(SCALARS, max_size=3)

    def check(drawn):
        key, value = drawn
        changed = gguf.GgufFile(file.path, {**file.metadata, key: value}, file.tensors)
        refused_or_read(lambda: gguf.model_of(changed), str(file.path))
        refused_or_read(lambda: tokenizers.from_gguf(changed), str(file.path))

    repeated(examples, st.tuples(st.sampled_from(sorted(file.metadata)), values), check)


@often
def test_lines_of_any_bytes_are_read_or_refused(examples, tmp_path):
    path = tmp_path / "lines.jsonl"

    def check(content):
        path.write_bytes(content)
        refused_or_read(lambda: read_jsonl(path), rf"{path}:\d+: ")

    lines = VALUES.map(lambda value: json.dumps(value).encode() + b"\n")
    odd = st.sampled_from([b"[" * 100_000 + b"\n", b'{"a": ' + b"9" * 5000 + b"}\n", b"\xff\n"])
    repeated(examples, st.lists(lines | odd | st.binary(max_size=8)).map(b"".join), check)
