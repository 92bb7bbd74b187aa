import json
import os
import subprocess
import sys
from decimal import Decimal

import pytest

from pujax import collect
from pujax.errors import ConfigError, PromptError
from pujax.records import Prompt, messages_key
from pujax.teacher import tables
from pujax.teacher.prompts import load_prompts, refuse_missing, refuse_pipes
from pujax.teacher.settings import TeacherConfig


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
        (['{"prompt": "One", "prompt": "Two"}'], r"p\.jsonl:1: .*two values are called 'prompt'"),
        (
            ['{"messages": [{"role": "user", "role": "system", "content": "x"}]}'],
            r"p\.jsonl:1: .*two values are called 'role'.*: mend this line",
        ),
        ([{"conversations": [{"from": "gpt", "value": "x"}]}], "`conversations` has no turn of"),
        ([["One"]], r"p\.jsonl:1: list, need an object"),
        ([{"question": "One"}], r"p\.jsonl:1: needs `prompt` or `messages`, found neither .*quest"),
        ([{"prompt": "One", "messages": []}], r"p\.jsonl:1: .* found both"),
        ([{"prompt": 3}], r"p\.jsonl:1: `prompt` must be a text that isn't empty, found 3"),
        ([{"prompt": " "}], r"p\.jsonl:1: `prompt` must be a text"),
        ([{"prompt": "a\0b"}], r"p\.jsonl:1: `prompt` has a NUL character, .*is the file UTF-16\?"),
        ([{"prompt": "One", "id": True}], r"p\.jsonl:1: `id` must be a text"),
        ([{"prompt": "One", "answer": ["x"]}], r"p\.jsonl:1: `answer` must be a text"),
        ([{"messages": []}], r"p\.jsonl:1: `messages` must be a list of turns"),
        ([{"messages": ["One"]}], r"p\.jsonl:1: messages\[0\] needs a `role`"),
        (
            [{"messages": [{"role": "bot", "content": "x"}]}],
            r"messages\[0\] needs a `role` of system, user, assistant, found 'bot'",
        ),
        (
            [{"conversations": [{"from": "human", "value": "x"}, {"role": "tool", "value": "y"}]}],
            r"p\.jsonl:1: `conversations\[1\]\.role` is 'tool': write human, gpt or system",
        ),
        ([{"messages": [{"role": "user"}]}], r"`messages\[0\]\.content` must be a text"),
        ([{"messages": [{"role": "system", "content": "x"}]}], r"the last turn must be the user's"),
        (
            [{"prompt": "One", "answer": 4}, {"prompt": "One"}],
            r"p\.jsonl:2: the same prompt came before with another answer or kind, or one of",
        ),
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
    # Not the line that had been reached when a whole block could not be decoded.
    (tmp_path / "p.csv").write_bytes(b"prompt\n" + b"caf\xc3\xa9\n" * 5000 + b"caf\xe9\n")
    with pytest.raises(PromptError, match=r"p\.csv:5002: not UTF-8 \(byte 4 is 0xe9\), likely"):
        list(load_prompts(str(tmp_path / "p.csv")))


FORMS = {
    "csv": "prompt,answer\nCafé?,ja\n",
    "tsv": "prompt\tanswer\nCafé?\tja\n",
    "jsonl": '\n{"prompt": "Café?"}\n',
    "json": '[\n{"prompt": "Café?"}]',
    "txt": "\nCafé?\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_another_encoding_is_read_where_it_says_so_and_else_refused(tmp_path, form):
    file = tmp_path / f"my p.{form}"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):  # the last two with their mark
        file.write_text(FORMS[form], encoding=encoding)
        (prompt,) = load_prompts(str(file))
        assert prompt.messages == user("Café?")
    file.write_bytes("\ufeff".encode("utf-16-be") + FORMS[form].encode("utf-16-be"))
    (prompt,) = load_prompts(str(file))
    assert prompt.messages == user("Café?")
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(PromptError, match=r"p\.\w+(:\d)?: not utf-16.* \(truncated data\): save"):
        list(load_prompts(str(file)))
    file.write_text(FORMS[form], encoding="cp1252")  # as Excel on Windows has it
    with pytest.raises(PromptError) as refused:
        list(load_prompts(str(file)))
    said = str(refused.value)
    assert f"p.{form}:2: not UTF-8 (byte " in said
    assert "is 0xe9), likely CP1252, in which it reads" in said
    assert "Café?" in said
    new = f"{tmp_path}/my p-utf8.{form}"
    assert f"iconv -f CP1252 -t UTF-8 '{file}' > '{new}'" in said
    file.write_text(FORMS[form], encoding="utf-16-le")  # without its mark
    with pytest.raises(PromptError, match=r"not UTF-8 .*likely UTF-16: convert it: iconv -f UTF-1"):
        list(load_prompts(str(file)))
    file.write_bytes(b"\x81\n" + FORMS[form].encode())
    with pytest.raises(PromptError, match=r"not UTF-8 .*convert it with iconv from what it is in"):
        list(load_prompts(str(file)))


def test_a_collection_reads_its_prompts_twice_and_says_so_of_a_pipe(tmp_path):
    pipe, file = tmp_path / "pipe", write(tmp_path / "p.txt", "Hi")
    os.mkfifo(pipe)
    for source in (str(pipe), [file, str(pipe)]):
        settings = collect.CollectRun(
            store=str(tmp_path / "a.jsonl"),
            data=collect.PromptsConfig(source),
            teacher=TeacherConfig(base_url="http://127.0.0.1:9/v1", model="m"),
        )
        with pytest.raises(
            PromptError, match=r"pipe: a pipe or a device can be read once only: write .* file"
        ):
            collect.run(settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt", "pipe"]
    refuse_pipes([file, "nowhere.txt", str(tmp_path)])  # which are told where they are read
    refuse_pipes({"dataset": "d"})


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
        ({"split": "test"}, PromptError, "dataset 'json': Unknown split.*: check its name, split"),
        ({"rows": 3}, ConfigError, "a dataset as a mapping: 'rows': no such key: its keys are"),
        ({"splt": "x"}, ConfigError, "'splt': no such key, did you mean split?"),
        ({}, PromptError, r"json\[0\]: needs `prompt` or `messages`"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(dataset, change, error, said):
    with pytest.raises(error, match=said):
        list(load_prompts(dataset | change))


def test_reading_files_does_not_import_datasets():
    code = "import sys, pujax.teacher.prompts; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.ndjson", "p.JSONL", "p.jsonlines", "p.NDJSON"])
def test_jsonl_has_several_names(tmp_path, name):
    source = write(tmp_path / name, {"id": "a", "prompt": "fine"})
    assert list(load_prompts(source)) == [Prompt("a", user("fine"))]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.TXT"])
def test_text_has_two_and_lines_end_as_they_like(tmp_path, name):
    (tmp_path / name).write_bytes(b"One\rTwo\r\nThree\n")
    prompts = load_prompts(str(tmp_path / name))
    assert [p.messages for p in prompts] == [user("One"), user("Two"), user("Three")]


@pytest.mark.parametrize("name", ["p.json", "p.md", "p.xlsx", "p.jsonl.gz"])
def test_any_other_name_is_refused(tmp_path, name):
    with pytest.raises(PromptError, match=r"p\..*\.jsonl"):
        list(load_prompts(write(tmp_path / name, {"prompt": "fine"})))


def test_a_json_file_is_a_list_of_rows(tmp_path):
    turns = [{"from": "human", "value": "One"}, {"from": "gpt", "value": "1"}]
    rows = [{"conversations": turns}, {"instruction": "Add", "input": "2 + 2", "output": "4"}]
    path = tmp_path / "p.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    found = list(load_prompts(str(path)))
    assert [prompt.messages for prompt in found] == [user("One"), user("Add\n\n2 + 2")]
    assert [prompt.answer for prompt in found] == ["1", "4"]
    for text, said in (
        ("", "no prompts in it"),
        ("[", "not one JSON list"),
        ('[{"prompt": "One"}, 2]', r"p\.json\[1\]: int, need an object"),
        ("[" * 9000, "not one JSON list"),
        ('[{"prompt": ""}]', r"p\.json\[0\]: `prompt` must be a text"),
    ):
        path.write_text(text)
        with pytest.raises(PromptError, match=said):
            list(load_prompts(str(path)))


@pytest.mark.parametrize(("name", "cut"), [("p.csv", ","), ("p.csv", ";"), ("p.TSV", "\t")])
def test_a_table_has_columns(tmp_path, name, cut):
    rows = (
        ("prompt", "answer", "id"),
        ("Capital of France?", '"Paris, of\ncourse"', "7"),
        ("Two", "", "8"),
    )
    source = write(tmp_path / name, *(cut.join(row) for row in rows))
    assert list(load_prompts(source)) == [
        Prompt("7", user("Capital of France?"), "Paris, of\ncourse"),
        Prompt("8", user("Two")),
    ]


def test_a_table_of_a_spreadsheet_whose_decimals_have_commas_is_read(tmp_path):
    source = write(tmp_path / "p.csv", "\ufeffprompt;answer", '"Was; und, was?";1,5')
    (prompt,) = load_prompts(source)
    assert (prompt.messages, prompt.answer) == (user("Was; und, was?"), "1,5")
    (prompt,) = load_prompts(write(tmp_path / "q.csv", "prompt", "a;b"))
    assert prompt.messages == user("a;b")
    (prompt,) = load_prompts(write(tmp_path / "s.csv", "\ufeffsep=|", "prompt|answer", "a;b,c|d"))
    assert (prompt.messages, prompt.answer) == (user("a;b,c"), "d")
    with pytest.raises(PromptError, match=r"s\.csv:3"):
        list(load_prompts(write(tmp_path / "s.csv", "sep=;", "prompt;answer", ";d")))


TSV = [
    (['"Tis a season\tx', 'Two\ty 5"'], [('"Tis a season', "x"), ("Two", 'y 5"')]),
    (['"Tis\tx', '"Twas\ty'], [('"Tis', "x"), ('"Twas', "y")]),
    (['"Hello" he said\tx'], [('"Hello" he said', "x")]),
    (['"Tis\tsize 5"'], [('"Tis', 'size 5"')]),
    (['"a ""b"""\t"c\td"', '"e\nf"\tg'], [('a "b"', "c\td"), ("e\nf", "g")]),
    (['"Paris"\tx', "", "Rome\ty"], [("Paris", "x"), ("Rome", "y")]),
]


@pytest.mark.parametrize(("rows", "found"), TSV)
def test_a_tsv_is_read_whether_or_not_its_writer_quotes(tmp_path, rows, found):
    source = write(tmp_path / "p.tsv", "prompt\tanswer", *rows)
    read = [(p.messages[0]["content"], p.answer) for p in load_prompts(source)]
    assert read == found


def test_lines_of_a_tsv_that_may_be_one_row_or_two_are_refused(tmp_path):
    source = write(tmp_path / "p.tsv", "prompt\tanswer", "A\tb", '"Tis\tx', 'size 5"\ty')
    with pytest.raises(PromptError, match=r"p\.tsv:3: not a table .a quoted cell of several lines"):
        list(load_prompts(source))


def test_parquet_is_a_table_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    turns = [[{"role": "user", "content": "One"}]]
    table = pyarrow.table({"messages": turns, "answer": [3], "id": [2**60]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert list(load_prompts(str(tmp_path / "p.parquet"))) == [Prompt(str(2**60), user("One"), "3")]
    # pandas makes 42.0 of 42 where another row has none.
    asked = ["One", "Two", "Three"]
    table = pyarrow.table({"prompt": asked, "answer": [42.0, None, 2.5], "id": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "q.parquet")
    found = load_prompts(str(tmp_path / "q.parquet"))
    assert [prompt.answer for prompt in found] == ["42", None, "2.5"]
    # A database's numbers are decimals.
    table = pyarrow.table({"prompt": asked, "answer": [Decimal("1.50"), None, Decimal("1E+3")]})
    parquet.write_table(table, tmp_path / "r.parquet")
    found = load_prompts(str(tmp_path / "r.parquet"))
    assert [prompt.answer for prompt in found] == ["1.50", None, "1000.00"]


def test_a_cell_that_python_can_not_hold_is_named_with_its_row_and_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    days = pyarrow.array([0, 2**30], pyarrow.int32()).cast(pyarrow.date32())
    late = pyarrow.array([0, 2**62], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    for when in (days, late):
        table = pyarrow.table({"prompt": ["One", "Two"], "when": when})
        parquet.write_table(table, tmp_path / "p.parquet")
        with pytest.raises(PromptError, match=r"p\.parquet\[1\]: 'when' can't be read \("):
            list(load_prompts(str(tmp_path / "p.parquet")))


def test_alpaca_and_sharegpt_are_known_by_their_columns(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]},
    )
    assert [(p.messages[-1]["content"], p.answer) for p in load_prompts(source)] == [
        ("Add.\n\n1 2", "3"),
        ("Say hi.", "hi"),
        ("Hi", "Yo"),
        ("Hi", None),
    ]


SYSTEM, HI = {"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Hi", "output": "x", "system": "S"}, (SYSTEM, HI)),
        ({"conversations": [{"from": "human", "value": "Hi"}], "system": "S"}, (SYSTEM, HI)),
        ({"prompt": "Hi", "system": "S"}, (SYSTEM, HI)),
        ({"messages": [SYSTEM, HI], "system": " S\n"}, (SYSTEM, HI)),
        ({"instruction": "Hi", "system": "", "history": []}, (HI,)),
        (
            {"instruction": "Hi", "system": "S", "history": [["a", "b"]]},
            (SYSTEM, HI | {"content": "a"}, {"role": "assistant", "content": "b"}, HI),
        ),
    ],
)
def test_a_rows_system_message_and_history_are_part_of_its_prompt(tmp_path, row, messages):
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", row))
    assert prompt.messages == messages


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [SYSTEM, HI], "system": "T"}, "`system` is another system message than the"),
        ({"prompt": "Hi", "system": {"a": 1}}, "`system` must be a text"),
        ({"instruction": "Hi", "history": [["a"]]}, "`history` must be a list of .question, answ"),
        ({"instruction": "Hi", "history": "a"}, "`history` must be a list of .question, answer"),
        ({"instruction": "Hi", "history": [["a", 3]]}, "`history` must be a text"),
        ({"instruction": "Hi", "conversations": [HI]}, "`conversations` or `instruction`, found"),
    ],
)
def test_a_system_message_or_history_that_is_none_is_refused(tmp_path, row, said):
    with pytest.raises(PromptError, match=r"p\.jsonl:1: .*" + said):
        list(load_prompts(write(tmp_path / "p.jsonl", row)))


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        (
            "p.csv",
            ["question,gold", "Why?,so"],
            r"p\.csv:1: the columns are \['question', 'gold'\]",
        ),
        ("p.csv", ["prompt,answer", "Hello, world,x"], r"p\.csv:2: not as many cells"),
        ("p.csv", ["prompt", '"torn'], r"p\.csv:.: not a table"),
        ("p.csv", ["prompt, answer", "Hi, x"], r"p\.csv:1: the column ' answer' has spaces around"),
        (
            "p.jsonl",
            ['{"prompt": "a"}\r{"prompt": "b"}\r'],
            r"p\.jsonl:1: .* end in a carriage",
        ),
        ("p.csv", ["prompt,answer,prompt", "a,b,c"], r"p\.csv:1: two columns are called 'prompt'"),
        ("p.txt", ["\u200b", " \ufeff "], r"no prompts in it"),
        (
            "p.jsonl",
            ['{"prompt": "\u200b"}'],
            r"p\.jsonl:1: `prompt` must be a text that isn't empty",
        ),
        ("p.csv", ["messages", "no"], r"p\.csv:2: `messages` is not JSON"),
        ("p.csv", ["prompt"], r"no prompts in it"),
        ("p.parquet", ["prompt"], r"p\.parquet: not Parquet"),
        ("p.jsonl", ['{"prompt": "x \\ud83d"}'], r"p\.jsonl:1: `prompt` has half a character.* 2:"),
        ("p.jsonl", ['{"id": "\\ud83d", "prompt": "x"}'], r"p\.jsonl:1: `id` has half a character"),
        ("p.jsonl", ['{"prompt": "x", "id": ' + "9" * 5000 + "}"], r"p\.jsonl:1: not JSON"),
        ("p.jsonl", ["[" * 100_000], r"p\.jsonl:1: not JSON"),
        ("p.jsonl", ['{"prompt": "x", "answer": NaN}'], r"`answer` must be a text"),
        ("p.jsonl", ['{"conversations": 3}'], r"`conversations` must be a list of turns"),
        (
            "p.jsonl",
            ['{"conversations": [{"from": 3, "value": 4}]}'],
            r"p.jsonl:1: `conversations\[0\].from` is 3: write human, gpt or system, or take",
        ),
    ],
)
def test_what_is_wrong_in_a_table_or_a_line_is_named(tmp_path, name, rows, said):
    with pytest.raises(PromptError, match=said):
        list(load_prompts(write(tmp_path / name, *rows)))


def test_a_cell_may_hold_a_long_document(tmp_path):
    (prompt,) = load_prompts(write(tmp_path / "p.csv", "prompt", "long " * 40_000 + "end"))
    assert len(prompt.messages[0]["content"]) == 200_003


def test_numbers_are_answers_and_ids_and_empty_ones_are_none(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {"prompt": "One", "id": 7, "answer": 3},
        {"prompt": "Two", "id": 8, "answer": 2.5, "kind": ""},
    )
    assert list(load_prompts(source)) == [
        Prompt("7", user("One"), "3"),
        Prompt("8", user("Two"), "2.5"),
    ]


def test_a_misspelt_key_is_told_once(tmp_path):
    row = {"prompt": "One", "awnser": "1", "topic": "x"}
    source = write(tmp_path / "p.jsonl", row, row | {"prompt": "Two"})
    said = []
    assert len(list(load_prompts(source, said.append))) == 2
    assert said == [f"{source}:1: 'awnser' is not read: did you mean 'answer'?"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{question", "data.prompts.template='{question': expected"),
        ("question}", "Single '}'"),
        ("{question!z}", "template names 'question'.*each as {column} alone"),
        ("{question:>9}", "each as {column} alone"),
        ("{question.foo}", "template names 'question.foo'"),
        ("{question[k]}", "each as {column} alone"),
        ("{}", "template names ''"),
        ("{empty}", "template names 'empty', which is null here"),
    ],
)
def test_a_template_has_columns_alone(template, said):
    row = {"question": "Q", "empty": None}
    with pytest.raises(PromptError, match=said):
        tables._fill(template, row, "d[0]")


def test_braces_are_written_twice():
    assert tables._fill('{{"a": {q}}}', {"q": 1}, "d[0]") == '{"a": 1}'


def test_a_missing_file_is_told_with_the_setting_that_names_it(tmp_path):
    here, gone = tmp_path / "here.csv", tmp_path / "gone.csv"
    here.touch()
    refuse_missing([str(here)], "preferences")
    with pytest.raises(
        PromptError, match=r"gone\.csv: No such file or directory: check preferences$"
    ):
        refuse_missing([str(here), str(gone)], "preferences")
    with pytest.raises(PromptError, match=r"^preferences=\[\]: an empty list: name at least one"):
        refuse_missing([], "preferences")
