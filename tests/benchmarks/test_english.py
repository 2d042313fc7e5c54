"""The rules that english.py measures by, on numbers small enough to be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch


def test_a_definition_that_is_likely_after_every_word_gains_nothing() -> None:
    from english_definitions import choices

    # -log p of three definitions after three words: the first definition is the likeliest after all of them
    nats = [[1.0, 9.0, 9.0], [1.5, 7.0, 9.0], [1.5, 9.0, 5.0]]
    assert choices(nats) == [0, 1, 2]
    assert [min(range(3), key=row.__getitem__) for row in nats] == [0, 0, 0]


def test_groups_are_of_one_part_of_speech_and_share_no_word() -> None:
    from english_definitions import CANDIDATES, groups

    made = groups(40)
    assert len(made) == 40 // CANDIDATES
    assert all(len({sense.part for sense in group}) == 1 for group in made)
    assert all(len({sense.definition for sense in group}) == CANDIDATES for group in made)
    senses = [(sense.word, sense.part) for group in made for sense in group]
    assert len(set(senses)) == len(senses)


def test_spans_are_whole_words_spread_over_the_texts() -> None:
    from english_texts import spans

    texts = ["a short one", " ".join(f"one{n}" for n in range(200)), " ".join(f"two{n}" for n in range(100))]
    found = spans(6, 40, texts)
    assert len(found) == len(set(found)) == 6
    assert all(20 < len(span) <= 40 for span in found)
    words = {word for text in texts[1:] for word in text.split()}
    assert all(set(span.split()) <= words for span in found)
    assert {span[:3] for span in found} == {"one", "two"}


def test_variety_counts_pairs_of_words() -> None:
    from english_fluency import variety

    row = variety(["the cat the cat", "the cat sat"])
    assert row["distinct_2"] == pytest.approx(3 / 5)
    three = -(2 / 3 * math.log(1 / 3) + 1 / 3 * math.log(1 / 3))
    assert row["entropy"] == pytest.approx((math.log(2) + three) / 2)


def test_nats_per_token_are_a_ratio_of_sums() -> None:
    from english_fluency import per_token

    ratio, error = per_token({"nats": [2.0, 10.0], "tokens": [2, 4]})
    assert ratio == 2.0
    assert error == pytest.approx(math.sqrt((2**2 + 2**2) * 2) / 6)


def test_checkpoints_of_a_run_know_their_minutes(tmp_path: Path) -> None:
    from english_models import checkpoints

    rows = [{"step": step, "seconds": 30.0 * step, "tokens_seen": 100 * step} for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("2", "4", "6", "8", "final"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    found = checkpoints("run", tmp_path, 3)
    assert [(c.name, c.path.name, c.minutes, c.tokens) for c in found] == [
        ("run 2", "checkpoint-2", 1.0, 200),
        ("run 4", "checkpoint-4", 2.0, 400),
        ("run 8", "checkpoint-final", 4.0, 800),
    ]
    assert [c.path.name for c in checkpoints("run", tmp_path, 1)] == ["checkpoint-final"]
    assert checkpoints("one", tmp_path / "checkpoint-2")[0].path == tmp_path / "checkpoint-2"


def test_the_source_judges_the_tokens_that_begin_in_a_span() -> None:
    from english_models import Judge
    from transformers import LlamaConfig, LlamaForCausalLM

    from dllm.pipelines.llada.tokenizer import char_tokenizer

    judge = Judge.__new__(Judge)  # without a folder to load
    judge.tokenizer = char_tokenizer()
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    judge.model = LlamaForCausalLM(LlamaConfig(vocab_size=len(judge.tokenizer), **shape)).eval()
    judge.start = judge.tokenizer.eos_token_id
    texts = ["abcdef", "abc"]
    (nats, _), (short, _) = judge.nats(texts)
    ids = torch.tensor([[judge.start, *judge.tokenizer("abcdef")["input_ids"]]])
    with torch.no_grad():
        scores = judge.model(input_ids=ids).logits.log_softmax(-1)
    expected = -scores[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(short, expected[:3])  # its company, and what is longer, change nothing
    assert judge.of_spans(texts, [(2, 5), (0, 1)]) == [
        (pytest.approx(float(expected[2:5].sum()), rel=1e-5), 3),
        (pytest.approx(float(expected[0]), rel=1e-5), 1),
    ]


def test_a_part_goes_on_and_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from measured import Part, Store

    path = tmp_path / "results.json"
    taken = []

    def take(name: str) -> dict[str, str]:
        taken.append(name)
        return {"is": name}

    Part(Store(path), "bits", 1.0, {"spans": 2}).measure({"a": lambda: take("a")})
    items = {"a": lambda: take("a"), "b": lambda: take("b")}
    Part(Store(path), "bits", -1.0, {"spans": 2}).measure(items)  # its time is up at once
    assert "1 of 2 rows are left for another run of the same command: b" in capsys.readouterr().err
    assert taken == ["a"]
    Part(Store(path), "bits", 1.0, {"spans": 2}).measure(items)
    assert taken == ["a", "b"]
    assert Store(path).rows("bits") == {"a": {"is": "a"}, "b": {"is": "b"}}
    Part(Store(path), "bits", 1.0, {"spans": 2}).measure({"a": lambda: take("a")}, {"a": "x"})
    Part(Store(path), "bits", 1.0, {"spans": 2}).measure({"a": lambda: take("a")}, {"a": "x"})
    Part(Store(path), "bits", 1.0, {"spans": 2}).measure({"a": lambda: take("a")}, {"a": "another model"})
    assert taken == ["a", "b", "a", "a"]
    assert Store(path).rows("bits")["a"] == {"is": "a", "weights": "another model"}
    with pytest.raises(SystemExit, match=r"holds rows of part 'bits' with other settings \(spans\)"):
        Part(Store(path), "bits", 1.0, {"spans": 3})
