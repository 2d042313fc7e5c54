"""Streams of rows: no document twice or left out in a pass, the same samples for everyone, and going on from any place."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.data.columns import ColumnNames
from dllm.data.duplicates import digests
from dllm.data.lanes import Cursor, StreamPlan
from dllm.data.maps import Fate, Fitting
from dllm.data.order import OrderedDataset
from dllm.data.shards import open_source
from dllm.data.sources import Reading
from dllm.data.spec import parse_dataset_args
from dllm.data.streams import StreamedRows, chained, lanes_of, streamed_rows
from dllm.errors import DataError, OptionError
from dllm.pipelines.llada.tokenizer import char_tokenizer

CHARS = char_tokenizer()
EOS, EOT = CHARS.eos_token_id, CHARS.convert_tokens_to_ids("<|eot_id|>")
TEXT = Reading(column="text")


def documents(count: int) -> list[str]:
    return [f"<{i}>" + "x" * (i * 7 % 23) for i in range(count)]


def write(folder: Path, kind: str, texts: list[str], files: int = 1) -> str:
    folder.mkdir(exist_ok=True)
    for index in range(files):
        part = datasets.Dataset.from_dict({"text": texts[index::files], "id": list(range(len(texts[index::files])))})
        path = folder / f"part-{index:02}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        elif kind == "txt":
            path.write_text("\n\n".join(part["text"]))
        else:
            {"parquet": part.to_parquet, "csv": part.to_csv, "json": part.to_json}[kind](path)
    if kind == "json":
        for path in folder.glob("*.json"):
            path.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    return str(folder)


def stream(args: str, *, group: int = 4, steps: int = 50, seed: int = 3, length: int = 10, **more: Any) -> StreamedRows:
    sources = chained([open_source(spec, TEXT)[0] for spec in parse_dataset_args(args)])
    plan = StreamPlan(seed=seed, group=group, steps=steps, buffer=more.pop("buffer", 40))
    return streamed_rows(sources, plan, CHARS, length=length)


def ids(rows: StreamedRows, samples: Any) -> list[list[int]]:
    return [rows[sample]["input_ids"] for sample in samples]


def lane_text(rows: StreamedRows, lane: int, steps: int) -> str:
    """What a lane gives in some steps, end-of-text as a line's end."""
    share = rows.plan.group // rows.lanes
    samples = [step * rows.plan.group + lane * share + place for step in range(steps) for place in range(share)]
    tokens = [token for sample in samples for token in rows[sample]["input_ids"]]
    return "".join("\n" if token == EOS else CHARS.convert_ids_to_tokens(token) for token in tokens)


@pytest.mark.parametrize(("kind", "files"), [("jsonl", 1), ("parquet", 1), ("jsonl", 40), ("parquet", 3), ("csv", 40)])
def test_a_pass_has_every_document_once(tmp_path: Path, kind: str, files: int) -> None:
    texts = documents(600)
    rows = stream(write(tmp_path / "d", kind, texts, files), steps=2000)
    assert rows.lanes == 4
    seen: list[str] = []
    for lane in range(4):
        whole = lane_text(rows, lane, sum(map(len, texts)) // 20).split("\n")[:-1]
        first_pass = whole[:150]
        assert len(set(first_pass)) == 150
        assert first_pass != sorted(first_pass, key=texts.index), "it is shuffled"
        seen += first_pass
        again = whole[150:300]
        assert again != first_pass
    assert sorted(seen) == sorted(texts)


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    expected = [*ids(stream(write(tmp_path / "j", "jsonl", documents(50))), range(60))]
    assert ids(stream(write(tmp_path / "k", kind, documents(50))), range(60)) == expected


@settings(max_examples=25)
@given(st.integers(0, 199), st.integers(1, 7), st.sampled_from([1, 40]), st.sampled_from(["jsonl", "parquet"]))
def test_a_stream_goes_on_from_any_sample(
    tmp_path_factory: pytest.TempPathFactory, stop: int, length: int, files: int, kind: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"going-on-{files}-{kind}"
    args = str(folder) if folder.exists() else write(folder, kind, documents(300), files)
    whole, checkpoint = stream(args, length=length), tmp_path_factory.mktemp("checkpoint")
    stop -= stop % 4  # a step ends
    expected = ids(whole, range(200))
    stopped = [stream(args, length=length) for _ in range(2)]
    for sample in range(stop):  # two processes, each with half of a step
        half = stopped[sample % 4 // 2]
        half.note(torch.tensor([half[sample]["cursor"]]))
    for process, half in enumerate(stopped):
        half.save(checkpoint, process)
    resumed = stream(args, length=length)
    resumed.load(checkpoint)
    assert ids(resumed, range(stop, 200)) == expected[stop:]
    if stop > 0:
        assert all(resumed._saved[lane].rows == stop // 4 for lane in range(4))


def test_going_on_reads_nothing_before_the_block(tmp_path: Path) -> None:
    args = write(tmp_path / "d", "jsonl", documents(2000))
    rows = stream(args, steps=400)
    for sample in range(1000):
        rows.note(torch.tensor([rows[sample]["cursor"]]))
    rows.save(tmp_path, 0)
    resumed = stream(args, steps=400)
    resumed.load(tmp_path)
    starts: list[int] = []
    (shard,) = resumed.sources[0].shards
    kind = type(shard)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def raw(self, start: int) -> Any:
            starts.append(start)
            return super().raw(start)

    object.__setattr__(resumed.sources[0], "shards", (Watched(path=shard.path, form=shard.form),))  # type: ignore[attr-defined]
    assert ids(resumed, range(1000, 1004)) == ids(rows, range(1000, 1004))
    assert min(starts) >= 400


def test_rows_can_be_asked_for_again(tmp_path: Path) -> None:
    args = write(tmp_path / "d", "jsonl", documents(300))
    rows, other = stream(args), stream(args)
    expected = ids(rows, range(40))
    assert ids(other, [39, 38, 39, 3, 20, 0]) == [expected[i] for i in (39, 38, 39, 3, 20, 0)]


def test_ordered_dataset_leaves_the_order_and_finds_the_longest_of_a_step(tmp_path: Path) -> None:
    rows = stream(write(tmp_path / "d", "jsonl", documents(300)))
    data = OrderedDataset(
        rows, seed=1, group=4, shuffle=False, length_of=lambda row, sample: row["input_ids"][0] + sample
    )
    got = [data[i] for i in range(12)]
    assert [row["sample"] for row in got] == list(range(12))
    assert [row["input_ids"] for row in got] == ids(rows, range(12))
    assert [row["pad_to"] for row in got[:4]] == [max(got[i]["input_ids"][0] + i for i in range(4))] * 4
    assert len(data) == 200


def test_another_seed_another_order(tmp_path: Path) -> None:
    args = write(tmp_path / "d", "jsonl", documents(300))
    assert ids(stream(args, seed=1), range(40)) != ids(stream(args, seed=2), range(40))


@pytest.mark.parametrize(("limits", "train", "test"), [("test:7", 7, 7), ("train:10", 0, 0), ("train:10,test:7", 7, 7)])
def test_test_rows_are_the_first_and_never_trained_on(tmp_path: Path, limits: str, train: int, test: int) -> None:
    texts = documents(40)
    args = write(tmp_path / "d", "jsonl", texts, 3)
    order = [*texts[0::3], *texts[1::3], *texts[2::3]]
    (spec,) = parse_dataset_args(f"{args}[{limits}]")
    source, rows = open_source(spec, TEXT)
    assert (rows["text"][:] if rows else []) == order[:test]
    streamed = streamed_rows([source], StreamPlan(seed=0, group=2, steps=400, buffer=8), CHARS, length=5)
    seen = Counter(lane_text(streamed, 0, 200).split("\n")[:-1])
    expected = order[train : train + 10] if "train" in limits else order[train:]
    assert set(seen) == set(expected)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_mixture_has_its_shares_and_goes_on(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "jsonl", ["a" * 20] * 100)
    two = write(tmp_path / "two", "jsonl", ["b" * 20] * 30)
    args = f"{one}[weight:3] | {two}[weight:1]"
    rows = stream(args, steps=300)
    expected = ids(rows, range(1200))
    b = CHARS.convert_tokens_to_ids("b")
    share = sum(b in row for row in expected) / len(expected)
    assert share == pytest.approx(0.25, abs=0.05)
    stopped = stream(args, steps=300)
    for sample in range(400):
        stopped.note(torch.tensor([stopped[sample]["cursor"]]))
    stopped.save(tmp_path, 0)
    resumed = stream(args, steps=300)
    resumed.load(tmp_path)
    assert ids(resumed, range(400, 1200)) == expected[400:]


def test_sources_without_weights_are_one_stream(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, "jsonl", [f"{name}{i}" for i in range(30)]) for name in "ab")
    rows = stream(f"{one} | {two}", steps=200)
    first = lane_text(rows, 0, 200).split("\n")[:60]
    assert sorted(first) == sorted(f"{name}{i}" for i in range(30) for name in "ab")
    with pytest.raises(DataError, match=r"streamed sources that are joined have no limits of their own"):
        stream(f"{one}[train:3] | {two}")


def talk(n: int, turns: int) -> dict[str, Any]:
    pair = [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": f"{n}!"}]
    return {"conversations": pair * turns}


@pytest.mark.parametrize("turns", ["drawn", "all"])
def test_conversations_are_streamed(tmp_path: Path, turns: str) -> None:
    rows = [talk(n, 1 + n % 3) for n in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (spec,) = parse_dataset_args(str(path))
    source, _ = open_source(spec, Reading(column="messages", names=ColumnNames()))
    plan = StreamPlan(seed=0, group=8, steps=50)
    fitting = Fitting(max_length=60, truncation="filter", turns=turns)
    streamed = streamed_rows([source], plan, CHARS, fitting=fitting)
    first = [streamed[n] for n in range(80)]
    assert all(len(row["input_ids"]) <= 60 and row["input_ids"][row["turns"][-1] - 1] == EOT for row in first)
    turns_of = {len(row["turns"]) // 2 for row in first}
    assert turns_of == ({1} if turns == "all" else {1, 2})
    short = sum(
        min(2, 1 + n % 3) if turns == "all" else n % 3 < 2 for n in range(40)
    )  # a third turn is beyond 60 tokens
    first_pass = [tuple(row["input_ids"]) for row in first[:short]]
    assert len(set(first_pass)) == short
    assert set(first_pass) >= {tuple(row["input_ids"]) for row in first}


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("weight", ["", ",weight:1"])
def test_a_test_row_of_one_stream_is_not_read_in_another(tmp_path: Path, form: str, weight: str) -> None:
    def row(n: int) -> dict[str, Any]:
        said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"<{n}>"}]
        return {"text": f"<{n}>"} if form == "text" else {"conversations": said}

    def again(n: int) -> dict[str, Any]:
        return {"text": f"<{n}>"} if form == "text" else {"prompt": "q", "completion": f"<{n}>"}

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(json.dumps(row(n)) + "\n" for n in range(20)))
    two.write_text("".join(json.dumps(again(n)) + "\n" for n in range(40)))
    opened = [
        open_source(spec, Reading(column=form))
        for spec in parse_dataset_args(f"{one}[test:7{weight}] | {two}[test:1{weight}]")
    ]
    sources, held = chained([source for source, _ in opened]), digests(test for _, test in opened if test is not None)
    plan = StreamPlan(seed=0, group=2, steps=300)
    if form == "text":
        rows = streamed_rows(sources, plan, CHARS, length=5, held=held)
    else:
        rows = streamed_rows(sources, plan, CHARS, fitting=Fitting(max_length=60), held=held)
    samples = [rows[n] for n in range(600)]
    samples.sort(key=lambda row: row["cursor"][:2])  # a document of one lane after the other
    text = CHARS.decode([token for row in samples for token in row["input_ids"]])
    assert [n for n in range(40) if f"<{n}>" in text] == [*range(7, 40)]
    rows.note(torch.tensor([row["cursor"] for row in samples]))
    met, read = int(rows.fates()[:, Fate.TEST].sum()), int(rows.fates().sum())
    assert met >= 12, "more than one pass"
    line = (
        f"Warning: {met} of the {read} training rows read so far are test rows of this run too, word for word: they are"
    )
    assert rows.told(rows.fates()) == [f"{line} left out."]


def test_a_stream_of_test_rows_alone_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(3 * (json.dumps({"text": "same"}) + "\n"))
    (spec,) = parse_dataset_args(f"{path}[test:1]")
    source, test = open_source(spec, TEXT)
    assert test is not None
    rows = streamed_rows([source], StreamPlan(seed=0, group=2, steps=5), CHARS, length=3, held=digests([test]))
    with pytest.raises(
        DataError, match=r"all rows to train on are test rows of this run too, word for word. Choose other"
    ):
        rows[0]


@pytest.mark.parametrize("stop", [0, 24, 36])
def test_what_is_cut_and_left_out_is_counted_and_a_stop_does_not_change_it(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "a.jsonl"
    silent = {"conversations": [{"from": "human", "value": "?"}]}
    kinds = [talk(1, 1), talk(1, 2), talk(10**40, 1), silent]
    path.write_text("".join(json.dumps(row) + "\n" for row in 10 * kinds))
    (spec,) = parse_dataset_args(str(path))
    short = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1!"}]
    length = len(CHARS.apply_chat_template(short, tokenize=True)["input_ids"]) + 3

    def opened() -> StreamedRows:
        source, _ = open_source(spec, Reading(column="messages"))
        plan = StreamPlan(seed=0, group=4, steps=20)
        return streamed_rows([source], plan, CHARS, fitting=Fitting(max_length=length))

    def read(rows: StreamedRows, samples: range) -> None:
        for sample in samples:
            rows.note(torch.tensor([rows[sample]["cursor"]]))

    rows, resumed = opened(), opened()
    read(rows, range(stop))
    rows.save(tmp_path, 0)
    resumed.load(tmp_path)
    read(resumed, range(stop, 41))  # 20 of a pass are learnt
    found = resumed.fates().sum(0)
    assert found[: Fate.LEFT_OUT].sum() == 40, "the last row's conversation is in hand"
    assert found[: Fate.LEFT_OUT].tolist() == [20, 20]
    assert all(20 <= n <= 30 for n in found[Fate.LEFT_OUT : Fate.TEST].tolist()), (
        "those before it, of the third pass too"
    )
    read(rows, range(stop, 41))
    assert rows.fates().tolist() == resumed.fates().tolist()
    (line,) = resumed.told(resumed.fates())
    cut = f"the end of 20 cut off, {found[2]} left out (the cut leaves nothing of an answer), {found[3]} left out (no answer"
    assert line == (
        f"training, as read so far: of {found.sum()} conversations, with --truncation right to {length} tokens, {cut} in them)"
    )
    assert opened().told(opened().fates()) == []


def test_a_stream_that_was_looked_into_can_be_given_to_a_worker(tmp_path: Path) -> None:
    rows = stream(write(tmp_path / "d", "jsonl", documents(300)))
    expected = ids(rows, range(20))
    given = copy.deepcopy(rows)  # goes through what pickling goes through, and cannot copy a generator either
    assert ids(given, range(20)) == expected
    assert ids(rows, range(20, 24)) == ids(given, range(20, 24))


def test_nothing_to_learn_is_an_error_and_not_an_endless_search(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(talk(1, 1)) + "\n")
    (spec,) = parse_dataset_args(str(path))
    source, _ = open_source(spec, Reading(column="messages"))
    rows = streamed_rows([source], StreamPlan(seed=0, group=2, steps=5), CHARS, fitting=Fitting(max_length=3))
    with pytest.raises(DataError, match="no row of a whole pass has an answer within --max_length: raise it"):
        rows[0]


def test_a_broken_line_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "tw\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not JSON"):
        ids(stream(str(path)), range(4))


def test_lanes_divide_a_step_and_a_small_source_is_one(tmp_path: Path) -> None:
    (spec,) = parse_dataset_args(write(tmp_path / "d", "jsonl", documents(1100)))
    source, _ = open_source(spec, TEXT)
    assert [lanes_of([source], group) for group in (1, 2, 6, 8, 12, 17, 32, 48)] == [1, 2, 6, 8, 12, 1, 16, 16]
    (spec,) = parse_dataset_args(f"{spec.name}[train:100]")
    assert lanes_of([open_source(spec, TEXT)[0]], 8) == 1
    (spec,) = parse_dataset_args(write(tmp_path / "c", "csv", documents(1100)))
    assert lanes_of([open_source(spec, TEXT)[0]], 8) == 1


def test_a_checkpoint_of_another_stream_is_refused(tmp_path: Path) -> None:
    args = write(tmp_path / "d", "jsonl", documents(300))
    stream(args).save(tmp_path, 0)
    with pytest.raises(
        OptionError, match="was saved while another stream was read: go on with the same --dataset_args"
    ):
        stream(args, seed=4).load(tmp_path)


def test_a_clone_of_a_data_set_of_the_hub_is_streamed(tmp_path: Path) -> None:
    args = write(tmp_path / "d", "parquet", documents(30), 2)
    (tmp_path / "d/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n")
    (spec,) = parse_dataset_args(f"{args}[test:4]")
    source, test = open_source(spec, TEXT)
    assert test is not None
    assert test["text"][:] == documents(30)[0:8:2]
    rows = streamed_rows([source], StreamPlan(seed=0, group=2, steps=400), CHARS, length=5)
    first = lane_text(rows, 0, 200).split("\n")[:26]
    assert sorted(first) == sorted(set(documents(30)) - set(test["text"]))
    assert rows[0]["cursor"][0] == 0
    assert Cursor(*rows[0]["cursor"][1:]).rows == 1
