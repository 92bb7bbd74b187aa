import json
import subprocess
import sys

import pytest

from pujax.errors import ConfigError, PromptError
from pujax.records import Prompt, messages_key
from pujax.teacher.prompts import load_prompts


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def user(text):
    return ({"role": "user", "content": text},)


def test_a_jsonl_prompt_becomes_one_user_turn_and_keeps_its_fields(tmp_path):
    source = write(
        tmp_path / "p.jsonl", {"id": "a", "prompt": "Hi", "answer": "yo", "kind": "chat"}
    )
    assert list(load_prompts(source)) == [Prompt("a", user("Hi"), "yo", "chat")]


def test_messages_keep_their_system_and_their_turns(tmp_path):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", {"messages": turns}))
    assert prompt.messages == tuple(turns)


def test_a_text_file_has_one_prompt_a_line_and_skips_blank_ones(tmp_path):
    source = write(tmp_path / "p.txt", "\ufeffOne", "", "  Two ")
    assert [prompt.messages for prompt in load_prompts(source)] == [user("One"), user("Two")]


def test_an_id_made_from_content_is_the_same_in_every_file(tmp_path):
    first = next(load_prompts(write(tmp_path / "a.txt", "Other", "One")))
    ids = [prompt.id for prompt in load_prompts(write(tmp_path / "b.txt", "One", "Other"))]
    assert ids[1] == first.id
    assert ids[0] == messages_key(user("One"))[:16]


def test_a_prompt_that_comes_again_under_its_id_is_dropped(tmp_path):
    a = write(tmp_path / "a.jsonl", {"id": "1", "prompt": "One"}, {"id": "1", "prompt": "One"})
    b = write(tmp_path / "b.jsonl", {"id": "1", "prompt": "One"}, {"id": "2", "prompt": "One"})
    assert [prompt.id for prompt in load_prompts([a, b])] == ["1", "2"]


def test_prompts_come_one_at_a_time(tmp_path):
    prompts = load_prompts(write(tmp_path / "p.jsonl", {"prompt": "One"}, "{torn"))
    assert next(prompts).messages == user("One")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"p\.jsonl: no prompts in it"),
        ([{"prompt": "One"}, '{"prompt": '], r"p\.jsonl:2: not JSON .* mend this line"),
        ([["One"]], r"p\.jsonl:1: list, need an object"),
        ([{"question": "One"}], r"p\.jsonl:1: needs `prompt` or `messages`, found neither .*quest"),
        ([{"prompt": "One", "messages": []}], r"p\.jsonl:1: .* found both"),
        ([{"prompt": 3}], r"p\.jsonl:1: `prompt` must be a text that isn't empty, found 3"),
        ([{"prompt": " "}], r"p\.jsonl:1: `prompt` must be a text"),
        ([{"prompt": "One", "id": True}], r"p\.jsonl:1: `id` must be a text"),
        ([{"prompt": "One", "answer": ["x"]}], r"p\.jsonl:1: `answer` must be a text"),
        ([{"messages": []}], r"p\.jsonl:1: `messages` must be a list of turns"),
        ([{"messages": ["One"]}], r"p\.jsonl:1: messages\[0\] needs a `role`"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], r"messages\[0\] needs a `role` of sys"),
        ([{"messages": [{"role": "user"}]}], r"`messages\[0\]\.content` must be a text"),
        ([{"messages": [{"role": "system", "content": "x"}]}], r"the last turn must be the user's"),
        (
            [{"prompt": "One", "id": "a"}, {"prompt": "Two", "id": "a"}],
            r"p\.jsonl:2: id 'a' came before with other content",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, rows, said):
    with pytest.raises(PromptError, match=said):
        list(load_prompts(write(tmp_path / "p.jsonl", *rows)))


def test_a_file_that_is_cut_off_is_told_from_a_line_that_is_wrong(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Tw')
    with pytest.raises(PromptError, match=r"p\.jsonl:2: not JSON .*the file is cut off here"):
        list(load_prompts(str(tmp_path / "p.jsonl")))


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"One\n\xff\n")
    with pytest.raises(PromptError, match=r"p\.txt:2: not UTF-8"):
        list(load_prompts(str(tmp_path / "p.txt")))


def test_a_missing_file_and_an_empty_list_are_named(tmp_path):
    with pytest.raises(PromptError, match=r"no\.jsonl: No such file"):
        list(load_prompts(str(tmp_path / "no.jsonl")))
    with pytest.raises(PromptError, match="empty list"):
        list(load_prompts([]))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """What names a dataset of three rows that `datasets` reads without a network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"n": n, "question": f"Q{n}", "hint": f"H{n}", "gold": f"A{n}"} for n in range(3)]
    file = write(tmp_path / "rows.jsonl", *rows)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return {"dataset": "json", "data_files": file, "split": "train"}


def test_a_dataset_is_mapped_sliced_and_templated(dataset):
    source = dataset | {
        "slice": "1:",
        "columns": {"id": "n", "answer": "gold"},
        "template": "{question} ({hint})",
    }
    assert list(load_prompts(source)) == [
        Prompt("1", user("Q1 (H1)"), "A1"),
        Prompt("2", user("Q2 (H2)"), "A2"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"columns": {"prompt": "query"}}, PromptError, "no column 'query': it has .*question"),
        ({"columns": {"text": "question"}}, ConfigError, "data.prompts.columns.*text"),
        ({"slice": "3:"}, PromptError, r"no rows in train\[3:\]"),
        ({"slice": "first"}, ConfigError, "START:STOP"),
        ({"template": "{query}"}, PromptError, r"json\[0\]: template names 'query'"),
        ({"split": "test"}, PromptError, "dataset 'json': Unknown split"),
        ({"rows": 3}, ConfigError, "unexpected keyword argument 'rows'"),
        ({}, PromptError, r"json\[0\]: needs `prompt` or `messages`"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(dataset, change, error, said):
    with pytest.raises(error, match=said):
        list(load_prompts(dataset | change))


def test_reading_files_does_not_import_datasets():
    code = "import sys, pujax.teacher.prompts; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
