"""Sources of rows: each kind of file and folder, limits, splits that share nothing, and errors that name the place."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from dllm.data.builtin import builtin_rows
from dllm.data.columns import ColumnNames, find_format
from dllm.data.sources import Reading, Rendering, load_sources, load_splits
from dllm.errors import DataError

TEXTS = [f"document {i}" for i in range(10)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question, **more},
            {"role": "assistant", "content": answer, **more},
        ]
    }


@pytest.fixture(
    params=[
        "jsonl",
        "jsonl.gz",
        "json",
        "parquet",
        "csv",
        "tsv",
        "txt",
        "arrow",
        "folder",
        "shards",
        "saved",
        "saved splits",
    ]
)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """TEXTS in each form that a source can have."""
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(10))})
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        write_jsonl(path, rows.to_list())
    elif request.param == "json":
        path.write_text(json.dumps(rows.to_list()), encoding="utf-8")
    elif request.param == "parquet":
        rows.to_parquet(path)
    elif request.param == "txt":
        path.write_bytes("\n\n\n".join(TEXTS).encode())
    elif request.param == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif request.param in ("csv", "tsv"):
        rows.to_csv(path, sep="," if request.param == "csv" else "\t", index=False)
    elif request.param == "arrow":
        rows.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif request.param == "shards":
        path.mkdir()
        for shard in range(2):
            rows.shard(2, shard, contiguous=True).to_parquet(path / f"part-{shard}.parquet")
    elif request.param == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", rows.to_list())
    elif request.param == "saved":
        rows.save_to_disk(path)
    else:
        datasets.DatasetDict(train=rows).save_to_disk(path)
    return path


def test_every_kind_of_source_gives_its_rows_and_one_column(source: Path) -> None:
    train, test = load_splits(str(source), column="text")
    assert train.column_names == ["text"]
    assert train["text"][:] == TEXTS
    assert test is None


@pytest.mark.parametrize(("train", "test"), [(None, 3), (2, 3), (7, 3), (99, 3), (5, 0), (None, 9)])
def test_test_rows_are_the_last_and_never_trained_on(source: Path, train: int | None, test: int) -> None:
    limits = f"train:{train},test:{test}" if train else f"test:{test}"
    train_rows, test_rows = load_splits(f"{source}[{limits}]", column="text")
    assert train_rows["text"][:] == TEXTS[: 10 - test][:train]
    assert (test_rows["text"][:] if test_rows else []) == TEXTS[10 - test :]


def test_files_of_a_folder_belong_to_the_split_that_their_names_say(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name, text in {"train-0.jsonl": "a", "train-1.jsonl": "b", "test/part.jsonl": "c", "notes.json": "d"}.items():
        write_jsonl(tmp_path / name, [{"text": text}])
    train, test = load_splits(str(tmp_path), column="text")
    assert (train["text"][:], test["text"][:]) == (["a", "b"], ["c"])  # type: ignore[index]
    train, _ = load_splits(f"{tmp_path}/train-*.jsonl[train:1]", column="text")
    assert train["text"][:] == ["a"]
    with pytest.raises(DataError, match=r"No file fits .*/none-"):
        load_splits(f"{tmp_path}/none-*.jsonl", column="text")


def test_splits_of_other_names(tmp_path: Path) -> None:
    splits = {"train_sft": [chat("a", "b")], "test_sft": [chat("c", "d")], "train_gen": [{"prompt": "e"}]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(
        tmp_path
    )
    train, test = load_splits(f"{tmp_path}[split:train_sft,test_split:test_sft]", column="messages")
    assert train.to_list() == [chat("a", "b")]
    assert test is not None
    assert test.to_list() == [chat("c", "d")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_training_row_that_is_a_test_row_is_left_out(tmp_path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "b", "a", "d"]})
    {"jsonl": rows.to_json, "parquet": rows.to_parquet, "csv": rows.to_csv}[kind](tmp_path / f"a.{kind}")
    name, said = f"{tmp_path}/a.{kind}", list[str]()
    train, test = load_splits(f"{name}[test:3]", column="text", say=said.append)
    assert (train["text"][:], test["text"][:]) == (["c"], ["b", "a", "d"])  # type: ignore[index]
    assert said == [
        f"Warning: 2 of the 3 training rows of {name} are test rows of this run too, word for word: they are left out."
    ]
    silent, _ = load_splits(f"{name}[test:3]", column="text")  # as the other processes do
    assert silent["text"][:] == ["c"]
    load_splits(f"{name}[train:2,test:1]", column="text", say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("weights", ["", "weight:1"])
def test_a_test_row_of_one_source_is_not_trained_on_in_another(tmp_path: Path, weights: str) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [chat("q", str(n)) for n in range(6)])
    pairs = [{"prompt": "q", "completion": str(n)} for n in (9, 5, 8, 4, 4, 3)]  # the same in another form
    two = write_jsonl(tmp_path / "two.jsonl", pairs)
    said: list[str] = []
    reading = Reading(column="messages", say=said.append)
    more = f",{weights}" if weights else ""
    sources = load_sources(
        f"{one}[test:2{more}] | {two}[test:1{more}] | builtin:addition[train:3,test:1{more}]", reading
    )
    answers = [[row["messages"][1]["content"] for row in source.train] for source in sources]
    assert answers[:2] == [["0", "1", "2"], ["9", "8"]]
    assert len(answers[2]) == 3
    assert said == [
        f"Warning: {shared} of the {whole} training rows of {path} are test rows of this run too, word for word: they are left "
        f"out."
        for path, shared, whole in ((one, 1, 4), (two, 3, 5))
    ]


def test_nothing_left_to_train_on_says_why(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "same"}] * 2) for name in ("one", "two"))
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "other"}, {"text": "same"}])
    with pytest.raises(
        DataError, match=r"All 2 training rows of .*two.jsonl are test rows of this run too, word for w"
    ):
        load_splits(f"{more}[test:1] | {two}", column="text")
    with pytest.raises(DataError, match=r"nothing is left to train on. Choose other test rows, or none with test:0."):
        load_splits(f"{one}[test:1]", column="text")


FORMS = {
    "messages": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                              {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                                   {"from": "gpt", "value": "a"}]},
    "sharegpt with a system column": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                                      "system": "s"},
    "prompt and completion": {"prompt": "q", "completion": "a", "system": "s"},
    "prompt and response": {"prompt": "q", "response": "a", "system": "s"},
    "prompt and completion of messages": {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}]},
    "instruction": {"instruction": "q", "input": "", "output": "a", "system": "s", "id": 7},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "repository"])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_a_conversation_becomes_messages(tmp_path: Path, form: str, kind: str) -> None:
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", [FORMS[form]])
    else:
        path = tmp_path if kind == "repository" else tmp_path / "a.parquet"
        datasets.Dataset.from_list([FORMS[form]]).to_parquet(tmp_path / "a.parquet")
        (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.parquet\n---\n")
    train, _ = load_splits(str(path), column="messages")
    assert train.to_list() == [FORMS["messages"]]


def test_an_input_is_part_of_the_question() -> None:
    pair = find_format(["instruction", "input", "output"], "messages", ColumnNames(), "here")
    row = {"instruction": "Add", "input": "1 and 2", "output": "3"}
    assert pair.convert(row, "here") == chat("Add\n\n1 and 2", "3")["messages"]


def test_columns_of_a_pair_can_be_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1", "r": "2", "who": "s", "messages": "wrong"}])
    names = ColumnNames(prompt="q", completion="r", system="who")
    (row,) = load_splits(str(path), column="messages", names=names)[0].to_list()
    assert row["messages"] == [{"role": "system", "content": "s"}, *chat("1", "2")["messages"]]


def test_conversations_are_pretrained_on_as_the_text_that_they_make(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("1", "2"), chat("3", "4")])
    render = Rendering("colons", lambda messages: "".join(f"{m['role']}: {m['content']}\n" for m in messages))
    train, _ = load_splits(f"{path} | builtin:addition[train:1]", column="text", render=render)
    assert train["text"][:2] == ["user: 1\nassistant: 2\n", "user: 3\nassistant: 4\n"]
    with pytest.raises(DataError, match="these are conversations, and a tokenizer trained here needs text"):
        load_splits(str(path), column="text")


def test_what_is_no_conversation_names_the_nearest_column(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"mesages": [], "id": 1}])
    with pytest.raises(
        DataError, match=r"no column 'messages', nor .*; it has mesages, id. Did you mean 'mesages'\? Name"
    ):
        load_splits(str(path), column="messages")


@pytest.mark.parametrize(("given", "other"), [("prompt", "completion"), ("completion", "prompt")])
def test_one_column_of_a_pair_asks_for_the_other(tmp_path: Path, given: str, other: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1", "r": "2"}])
    message = f"--{given}_column q goes with --{other}_column, and there is no column {other!r}: name that one too. It has q, r."
    with pytest.raises(DataError, match=message):
        load_splits(str(path), column="messages", names=ColumnNames(**{given: "q"}))


@pytest.mark.parametrize(
    ("there", "near"),
    [
        (["id", "mesages"], "Did you mean 'mesages'? Name"),
        (
            ["Instruction", "Input", "Output"],
            "Did you mean --prompt_column Instruction --completion_column Output? Name",
        ),
        (["question", "answer"], "Did you mean --prompt_column question --completion_column answer? Name"),
        (["id", "a", "b"], "it has id, a, b. Name the right one with"),
        (["instruction;output"], "Fields seem to be separated by ';': a .csv has commas, a .tsv has tabs. Name"),
    ],
)
def test_columns_that_may_be_meant_are_named(there: list[str], near: str) -> None:
    with pytest.raises(DataError, match=re.escape(near)):
        find_format(there, "messages", ColumnNames(), "here")


def test_text_to_fine_tune_on_is_sent_to_pretraining(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(
        DataError, match=r"no column 'messages', .*; it has text. .* Text without answers is for dllm pretrain"
    ):
        load_splits(str(tmp_path / "a.txt"), column="messages")


def test_a_misspelt_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "own.csv", [])
    with pytest.raises(DataError, match=r"There is no file .*/own.cvs. Check .* Did you mean '.*/own.csv'\?$"):
        load_splits(str(tmp_path / "own.cvs"), column="text")
    with pytest.raises(DataError, match=r"There is no file .*/other.csv. Check the path; it is taken from [^?]*$"):
        load_splits(str(tmp_path / "other.csv"), column="text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'own.cvs' is no file or folder here, .* Did you mean 'own.csv'\?$"):
        load_splits("own.cvs", column="text")
    with pytest.raises(
        DataError, match=r"'no/own.csx' is no file or folder here, and loading it from the hub fa[^?]*$"
    ):
        load_splits("no/own.csx", column="text")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A data set of the hub as `git clone` gives it: two configurations, files in folders, one without a test split."""
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: plain\n  data_files: data/*.parquet\n- config_name: both\n"
        "  data_files:\n  - split: train\n    path: both/a.parquet\n  - split: test\n    path: both/b.parquet\n---\n# Rows\n"
    )
    for folder in ("data", "both"):
        (tmp_path / folder).mkdir()
    datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(10))}).to_parquet(tmp_path / "data/0.parquet")
    datasets.Dataset.from_dict({"text": TEXTS[:8]}).to_parquet(tmp_path / "both/a.parquet")
    datasets.Dataset.from_dict({"text": TEXTS[8:]}).to_parquet(tmp_path / "both/b.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "train", "test"),
    [
        ("name:plain", TEXTS, []),
        ("name:plain,test:2", TEXTS[2:], TEXTS[:2]),
        ("name:plain,test:2,train:3", TEXTS[2:5], TEXTS[:2]),
        ("name:plain,test:2,train:99", TEXTS[2:], TEXTS[:2]),
        ("name:plain,train:3", TEXTS[:3], []),
        ("name:both", TEXTS[:8], TEXTS[8:]),
        ("name:both,train:2,test:1", TEXTS[:2], TEXTS[8:9]),
        ("name:both,split:test,train:2,test:0", TEXTS[8:], []),
    ],
)
def test_a_clone_of_a_data_set_of_the_hub(clone: Path, keys: str, train: list[str], test: list[str]) -> None:
    rows = load_splits(f"{clone}[{keys}]", column="text")
    assert rows[0].to_dict() == {"text": train}
    assert (rows[1].to_dict() if rows[1] else {"text": []}) == {"text": test}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", r"has several configurations. It can be one of: both, plain. Write  .*\[name:CONFIG\]"),
        ("[name:plane]", r"has no configuration 'plane'. Did you mean 'plain'\? Write"),
        (
            "[name:both,split:validation]",
            r"has no split named validation; it has train, test. Name the one to train on",
        ),
        ("[name:plain,test:10]", "has 10 rows in one split: test:10 leaves none to train on"),
    ],
)
def test_what_a_clone_has_not_is_named(clone: Path, keys: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_splits(f"{clone}{keys}", column="text")


def test_rows_of_a_clone_are_read_through_a_cache_on_the_disk(clone: Path) -> None:
    for _ in range(2):
        train, _ = load_splits(f"{clone}[name:plain,train:3]", column="text")
        assert train.cache_files


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_a_folder_with_a_test_split_keeps_it(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "both"
    if kind == "files":
        folder.mkdir()
        (folder / "train.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
        write_jsonl(folder / "test.jsonl", [{"text": "unseen"}, {"text": "too"}])
    else:
        datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": TEXTS}),
            test=datasets.Dataset.from_dict({"text": ["unseen", "too"]}),
            other=datasets.Dataset.from_dict({"label": [1]}),
        ).save_to_disk(folder)
    train, test = load_splits(str(folder), column="text")
    assert (train["text"][:], test["text"][:]) == (TEXTS, ["unseen", "too"])  # type: ignore[index]
    train, test = load_splits(f"{folder}[train:4,test:1]", column="text")
    assert (train["text"][:], test["text"][:]) == (TEXTS[:4], ["unseen"])  # type: ignore[index]
    assert load_splits(f"{folder}[test:0]", column="text")[1] is None


@pytest.mark.parametrize("column", ["text", "messages"])
def test_built_in_rows_are_those_of_the_registry(column: str) -> None:
    train, test = load_splits("builtin:addition[train:30,test:7]", column=column)
    assert train.to_list() == builtin_rows("addition", "train", 30, column=column)
    assert test is not None
    assert test.to_list() == builtin_rows("addition", "test", 7, column=column)
    assert load_splits("builtin:addition[train:3,test:0]", column=column)[1] is None


def test_several_sources_are_joined_in_order_each_with_its_limits(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS])
    two = tmp_path / "two.txt"
    two.write_text("first\nline\n\nsecond", encoding="utf-8")
    train, test = load_splits(f"{one}[train:2,test:1] + {two} + builtin:addition[train:1,test:1]", column="text")
    sums = {split: builtin_rows("addition", split, 1, column="text")[0]["text"] for split in ("train", "test")}
    assert train["text"][:] == [*TEXTS[:2], "first\nline", "second", sums["train"]]
    assert test["text"][:] == [TEXTS[9], sums["test"]]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_with_other_keys_are_joined(tmp_path: Path, kind: str) -> None:
    rows = [chat("a", "b", name="someone"), chat("c", "d", name="other")]
    path = tmp_path / f"named.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    train, _ = load_splits(f"{path} + builtin:addition[train:1,test:0]", column="messages")
    sums = builtin_rows("addition", "train", 1, column="messages")
    assert train.to_list() == [chat("a", "b"), chat("c", "d"), *sums]


def test_a_text_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(
        DataError, match=r"numbers.parquet: the column 'text' holds .*int64.*, and it has to hold string"
    ):
        load_splits(f"{tmp_path}/numbers.parquet + builtin:addition[train:1]", column="text")


def test_a_column_of_another_name_is_used_and_the_others_are_left_out(tmp_path: Path) -> None:
    rows = [{"body": text, "text": "wrong"} for text in TEXTS]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for file in (path, tmp_path / "a.parquet"):
        train, _ = load_splits(str(file), column="text", names=ColumnNames(text="body"))
        assert train[:] == {"text": TEXTS}


def test_rows_may_differ_in_columns_that_are_not_used(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 1}, {"text": "b"}, {"id": "x", "text": "c", "z": []}])
    assert load_splits(str(path), column="text")[0]["text"][:] == ["a", "b", "c"]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    for text in ("before", "after!"):  # of one length: only the time tells them apart
        path = write_jsonl(tmp_path / "same.jsonl", [{"text": text}])
        assert load_splits(str(path), column="text")[0]["text"][:] == [text]


def test_windows_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nlines\r\n")
    assert load_splits(f"{tmp_path}/a.jsonl", column="text")[0]["text"][:] == ["one", "two"]
    assert load_splits(f"{tmp_path}/a.txt", column="text")[0]["text"][:] == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "b"\n',
            "a.jsonl, line 3: not JSON (Expecting ',' delimiter at column 1)",
        ),
        ("a.jsonl", b'{"text": "a"}\n' * 3000 + b"{broken}\n", "a.jsonl, line 3001: not JSON (Expecting property name"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2: a row is an object like {...}, not '[\"b\"]'"),
        (
            "a.jsonl",
            b'{"text": "a"}\n' * 3000 + b'{"text": "\xff"}',
            "a.jsonl, line 3001: not UTF-8 text (invalid start",
        ),
        ("a.txt", b"one\n\n\xfe\n", "a.txt, line 3: not UTF-8 text (invalid start byte). Save the file as UTF-8."),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"txt": "b", "id": 1}\n',
            "a.jsonl, line 2: there is no column 'text'; the row has txt,",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', "a.jsonl, line 2: 'text' is '7', and it has to be a string."),
        ("a.jsonl", b"", "a.jsonl is empty."),
        ("a.txt", b"", "a.txt is empty."),
        ("a.parquet", b"", "a.parquet is empty."),
        ("a.jsonl", b"\n \n", "a.jsonl has no rows."),
        ("a.txt", b"\n\n", "a.txt has no rows."),
        ("a.json", b"[]", "a.json has no rows."),
        ("a.json", b'{"text": "a"}', "a.json is not a list of objects. For one object a line, name the file .jsonl."),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "a.json is not JSON: Extra data"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a readable parquet file: "),
        ("a.arrow", b"ARROW1 and no more", "a.arrow is not a readable arrow file: "),
        ("a.csv", b"a,b", "a.csv has no rows."),
        ("a.csv", b"id,text\n1,one\n2\n", "a.csv, line 3: 1 fields, and the first line names 2 columns."),
        ("a.csv", b'id,text\n1,"one\nline"\n2,two,2\n', "a.csv, line 4: 3 fields, and the first line names 2 columns."),
        ("a.csv", b'id,text\n1,"one"s\n', "a.csv, line 2: not CSV ("),
        ("a.csv", b"text,text\n1,2\n", "a.csv, line 1: a column's name is there twice: text, text."),
        ("a.csv", b"id,txt\n1,2\n", "a.csv, line 2: there is no column 'text'; it has id, txt. Did you mean 'txt'?"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz, after line 0: the compressed file is broken"),
        ("a.xlsx", b"a,b", "a.xlsx: dllm reads .jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, not .xlsx."),
        ("rows", b"a,b", ".parquet, .arrow, not a file without an ending."),
    ],
)
def test_an_unreadable_file_is_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_splits(str(tmp_path / name), column="text")


@pytest.mark.parametrize("bad", [[], None, [{"role": "user", "content": None}], [{"role": "user"}], "a question"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_row_that_is_no_conversation_is_named_with_its_place(tmp_path: Path, kind: str, bad: Any) -> None:
    path, good = tmp_path / f"chats.{kind}", chat("a", "b")
    rows = [good, good, {"messages": bad}, good]
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        if isinstance(bad, str):
            rows = [{"messages": "a question"}]
        datasets.Dataset.from_list(rows).to_parquet(path)
    place = f"chats.{kind}, {'line' if kind == 'jsonl' else 'row'} {1 if len(rows) == 1 else 3}: the messages are "
    with pytest.raises(DataError, match=re.escape(place) + r".*: they are a list like \[\{\"role\": \"user\""):
        load_splits(str(path), column="messages")


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["a"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: there is no column 'text'; it has body, id. Name the"):
        load_splits(f"{tmp_path}/a.parquet", column="text")
    with pytest.raises(DataError, match=r"no column 'turns'; it has body, id. Name the right one with --messages_col"):
        load_splits(f"{tmp_path}/a.parquet", column="messages", names=ColumnNames(messages="turns"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no train file: name it train.jsonl, .parquet, .csv or .txt."),
        (["test.jsonl"], "has no train file"),
        (["train.jsonl", "train.txt"], "has train.jsonl and train.txt: keep one file for train."),
    ],
)
def test_a_folder_without_one_train_file_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write_jsonl(tmp_path / name, [{"text": "a"}])
    with pytest.raises(DataError, match=re.escape(message)):
        load_splits(str(tmp_path), column="text")


def test_a_saved_data_set_without_a_train_split_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict(validation=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError,
        match=r"saved has no split named train; it has validation. Name the one to train on: .*saved\[split:NAME\]",
    ):
        load_splits(str(tmp_path / "saved"), column="text")


def test_limits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(DataError, match=r"has 10 rows in one split: test:10 leaves none to train on. Ask for fewer."):
        load_splits(f"{path}[test:10]", column="text")


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*/a.jsonl. Check the path; it is taken from /"):
        load_splits(f"{tmp_path}/a.jsonl", column="text")
    with pytest.raises(DataError, match=r"there is no built-in data set 'txt'. Did you mean 'text'\?"):
        load_splits("builtin:txt", column="text")
    with pytest.raises(DataError, match=r"builtin:text has no column 'messages': it has 'text'"):
        load_splits("builtin:text", column="messages")


@pytest.mark.parametrize("limits", ["", "[train:5,test:2]"])
def test_a_hub_id_without_a_network_says_so(limits: str) -> None:
    message = "'nobody/nothing' is no file or folder here, and loading it from the hub failed: HF_HUB_OFFLINE is set. "
    with pytest.raises(DataError, match=re.escape(message)):
        load_splits(f"nobody/nothing{limits}", column="text")
