"""The engine's front door: texts in, texts out, piece by piece, and what it refuses."""

from __future__ import annotations

import gc
import re
import threading
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextDiffusionStreamer

from dllm.engine.buffers import KeyValues
from dllm.engine.tickets import Cancelled, CommittedBlock
from dllm.errors import CheckpointError, NonFiniteError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM
from dllm.pipelines.llada.engine import Engine
from dllm.pipelines.llada.tokenizer import EOS, EOT, MASK, bpe_tokenizer, char_tokenizer

TOKENIZER = char_tokenizer()
CONTEXT = 64
PATIENCE = 60


@cache
def model() -> LLaDAModelLM:
    """Random weights in fp64, where no company changes what is largest; it never proposes the mask."""
    torch.manual_seed(0)
    ids: dict[str, Any] = dict(
        mask_token_id=TOKENIZER.mask_token_id, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=1
    )
    shape: dict[str, Any] = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64, max_sequence_length=CONTEXT)
    made = LLaDAModelLM(LLaDAConfig(vocab_size=len(TOKENIZER), **ids, **shape))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
        made.get_output_embeddings().weight[TOKENIZER.mask_token_id] = 0.0
    return made.double().eval()


def writes(tokens: list[str], tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> LLaDAModelLM:
    """A model that is sure of one token at each position, whatever it is given; surer of earlier ones."""
    ids: dict[str, Any] = dict(
        mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1
    )
    shape: dict[str, Any] = dict(d_model=8, n_layers=1, n_heads=1, mlp_hidden_size=8, max_sequence_length=CONTEXT)
    made = LLaDAModelLM(LLaDAConfig(vocab_size=len(tokenizer), **ids, **shape)).eval()
    logits_LV = torch.zeros(CONTEXT, len(tokenizer))
    logits_LV[torch.arange(len(tokens)), tokenizer.convert_tokens_to_ids(tokens)] = 9.0 - torch.arange(len(tokens)) / 32

    def sure(_module: object, args: Any, kwargs: dict[str, Any]) -> Any:
        position_N = kwargs["position_ids"][0][kwargs["logits_to_keep"]]
        readout = kwargs["readout"]
        return args, {**kwargs, "readout": lambda _head, _hidden: readout(torch.nn.Identity(), logits_LV[position_N])}

    made.register_forward_pre_hook(sure, with_kwargs=True)
    return made


def idle(engine: Engine) -> bool:
    return not (engine.scheduler.running or engine.scheduler.waiting)


PROMPTS = ["1+1=", "a", "some words. ", [{"role": "user", "content": "2"}], "3" * 20]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_length": 4, "steps": 6, "temperature": 0.7},
        {"policy": "wino", "threshold": 0.1, "verify_threshold": 0.2},
        {"cache": "dual", "block_length": 5, "cfg_scale": 1.0},
        {"threshold": 0.2, "early_stop": False, "seed": 3, "temperature": 1.0},
        {"block_policy": "adablock", "block_length": 3, "delimiters": (9, 20), "delimiter_threshold": 0.05},
        {"early_answer": "prophet", "early_gap": 0.5, "middle_gap": 0.5, "cache": "prefix", "block_length": 3},
    ],
    ids=str,
)
def test_writes_what_generate_writes_with_few_rows_and_many(options: dict[str, Any]) -> None:
    expected = llada.generate(model(), TOKENIZER, PROMPTS, gen_length=10, **options)
    for max_rows in (2, 32):
        with Engine(model(), TOKENIZER, max_rows=max_rows) as engine:
            found = engine.generate(PROMPTS, gen_length=10, **options)
        assert [x.tolist() for x in found.sequences] == [x.tolist() for x in expected.sequences]
        assert (found.texts, found.steps, found.exact) == (expected.texts, expected.steps, expected.exact)
        assert found.new_tokens == expected.new_tokens
        assert engine.scheduler.most_rows <= max_rows
        assert idle(engine)
    assert found.nfe == expected.nfe


GROWING: dict[str, Any] = dict(length_policy="daedal", gen_length=14, initial_length=3, expansion_factor=4)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_threshold": 1e-3},
        {"eos_threshold": 1e-4, "expand_threshold": 0.2},
        {"eos_threshold": 1e-4, "cache": "dual", "block_length": 3, "cfg_scale": 1.0},
    ],
    ids=str,
)
def test_answers_that_grow_are_streamed_too(options: dict[str, Any]) -> None:
    expected = llada.generate(model(), TOKENIZER, PROMPTS, **GROWING, **options)
    lengths = [len(sequence) for sequence in expected.sequences]
    assert max(expected.new_tokens) > 3
    with Engine(model(), TOKENIZER, max_rows=4) as engine:
        found = engine.generate(PROMPTS, **GROWING, **options)
        assert [x.tolist() for x in found.sequences] == [x.tolist() for x in expected.sequences]
        assert (found.texts, found.new_tokens) == (expected.texts, expected.new_tokens)
        for row, prompt in enumerate(PROMPTS):
            ticket = engine.submit(prompt, request=row, watch=True, **GROWING, **options)
            canvas, blocks = ticket.request.canvas, []
            for event in ticket:
                if isinstance(event, CommittedBlock):
                    blocks += event.position.tolist()
                else:
                    canvas = event.applied(canvas)
            assert blocks == list(range(int((~ticket.request.masked).sum()), lengths[row]))
            written = canvas != TOKENIZER.mask_token_id
            assert canvas[written].tolist() == expected.sequences[row][written].tolist()
    with Engine(model(), TOKENIZER) as engine:
        assert "".join(engine.stream(PROMPTS[0], **GROWING, **options)) == expected.texts[0]
        shown = Shown()
        assert "".join(engine.stream(PROMPTS[0], streamer=shown, **GROWING, **options)) == expected.texts[0]
    whole = [token for value in shown.confirmed for token in value.flatten().tolist()]
    assert whole == expected.sequences[0].tolist()[: len(whole)]


class Shown:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.confirmed: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.confirmed.append(value.clone())

    def put_draft(self, value: Tensor) -> None:
        assert value.dim() == 1

    def end(self) -> None:
        assert self.confirmed


def test_infilling_is_submitted_too() -> None:
    text = f"1{MASK * 3}2{MASK}"
    engine = Engine(model(), TOKENIZER)
    expected = llada.infilling(model(), TOKENIZER, [text], block_length=2, temperature=0.5, requests=[7])
    ticket = engine.submit_infilling(text, request=7, block_length=2, temperature=0.5, watch=True)
    assert ticket.answer().canvas.tolist() == expected.sequences[0].tolist()
    assert len(list(ticket)) == 4 + 2
    for name in ("gen_length", "max_new_tokens", "early_stop"):
        with pytest.raises(OptionError, match=f"infilling takes no {name}"):
            engine.submit_infilling(text, **{name: 3})
    assert idle(engine)


def test_many_threads_have_their_own_answers() -> None:
    expected = llada.generate(model(), TOKENIZER, PROMPTS, gen_length=8, requests=[0] * 5, temperature=1.0).texts
    found: dict[int, list[str]] = {}

    def ask(engine: Engine, number: int) -> None:
        streamed = "".join(engine.stream(PROMPTS[number], gen_length=8, temperature=1.0, block_length=8))
        whole = engine.generate([PROMPTS[number]], gen_length=8, temperature=1.0).texts
        found[number] = [streamed, *whole]

    with Engine(model(), TOKENIZER, max_rows=3, background=True) as engine:
        threads = [threading.Thread(target=ask, args=(engine, number), daemon=True) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert [found[number] for number in range(5)] == [[text, text] for text in expected]


# --- streams


@pytest.mark.parametrize("block_length", [None, 1, 3])
@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_pieces_join_to_the_text(prompt: str, block_length: int | None) -> None:
    engine = Engine(model(), TOKENIZER)
    options: dict[str, Any] = dict(gen_length=12, block_length=block_length, temperature=0.9)
    pieces = list(engine.stream(prompt, **options))
    assert "".join(pieces) == llada.generate(model(), TOKENIZER, [prompt], **options).texts[0]
    assert all(pieces)
    assert idle(engine)


def test_a_piece_comes_as_soon_as_its_block_is_complete() -> None:
    engine = Engine(writes(["x", *"abcdef"]), TOKENIZER)
    told = [(piece, engine.scheduler.nfe) for piece in engine.stream("x", gen_length=6, block_length=2)]
    assert told == [("ab", 2), ("cd", 4), ("ef", 6)]
    noted = Noted()  # the same in fewer steps
    told = [
        (piece, engine.scheduler.nfe)
        for piece in engine.stream("x", streamer=noted, gen_length=6, block_length=2, steps=3)
    ]
    assert told == [("ab", 7), ("cd", 8), ("ef", 9)]


def test_no_piece_splits_a_character() -> None:
    """Blocks of one byte each; two, three and four bytes to a character, and one that is never completed."""
    tokenizer = bpe_tokenizer(["abc"], 262)
    text = "é€😀a"
    tokens = tokenizer.tokenize(text)
    assert len(tokens) == 10
    engine = Engine(writes(["a", *tokens, tokens[0]], tokenizer), tokenizer)
    assert list(engine.stream("a", gen_length=10, block_length=1)) == ["é", "€", "😀", "a"]
    pieces = list(engine.stream("a", gen_length=11, block_length=3))
    assert "".join(pieces) == text + "\N{REPLACEMENT CHARACTER}" == engine.generate(["a"], gen_length=11).texts[0]
    assert pieces[:2] == ["é", "€"]


class Noted:
    """A streamer that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(("put", value.flatten().tolist()))

    def put_draft(self, value: Tensor) -> None:
        self.calls.append(("draft", value.tolist()))

    def end(self) -> None:
        self.calls.append(("end", []))


def test_a_streamer_is_shown_the_prompt_drafts_and_blocks_up_to_the_end() -> None:
    engine, noted = Engine(writes(["x", "a", "b", EOT, "c", "d", "e"]), TOKENIZER), Noted()
    pieces = list(engine.stream("x", streamer=noted, gen_length=6, block_length=2, early_stop=False))
    assert pieces == ["ab"]
    a, b, c, end, mask = TOKENIZER.convert_tokens_to_ids(["a", "b", "c", EOT, MASK])
    assert noted.calls == [
        ("put", TOKENIZER.convert_tokens_to_ids(["x"])),
        ("draft", [a, *[mask] * 5]),
        ("draft", [a, b, *[mask] * 4]),
        ("put", [a, b]),
        ("draft", [end, *[mask] * 3]),
        ("draft", [end, c, mask, mask]),
        ("put", [end]),
        ("end", []),
    ]


def test_the_streamer_of_transformers_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(writes(["x", *"abcd", EOS, *"ef"]), TOKENIZER)
    streamer = TextDiffusionStreamer(TOKENIZER, skip_special_tokens=True)
    assert "".join(engine.stream("x", streamer=streamer, gen_length=7, block_length=2)) == "abcd"
    printed = capsys.readouterr().out
    assert "\033[33ma\033[0m" in printed  # a draft, in yellow
    assert (
        re.sub(r"\0337.*?\0338\033\[J", "", printed, flags=re.S) == "xabcd\n"
    )  # what stays once drafts are wiped away


def test_our_streamer_shows_a_sign_for_each_mask(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = bpe_tokenizer(["abc"], 262)
    engine = Engine(writes(["x", *"abcd"], tokenizer), tokenizer)
    shown = llada.DraftStreamer(tokenizer, skip_prompt=True)
    assert "".join(engine.stream("x", streamer=shown, gen_length=4)) == "abcd"
    printed = capsys.readouterr().out
    assert [f"\033[33m{draft}\033[0m" in printed for draft in ("a___", "ab__", "abc_")] == [True] * 3
    assert MASK not in printed
    llada.DraftStreamer(TOKENIZER).put_draft(torch.tensor([TOKENIZER.mask_token_id]))
    assert ("_" if "_" in TOKENIZER.get_vocab() else MASK) in capsys.readouterr().out


@pytest.mark.parametrize("background", [False, True])
def test_a_stream_that_is_left_gives_its_row_up(background: bool) -> None:
    noted = Noted()
    with Engine(model(), TOKENIZER, max_rows=1, background=background) as engine:
        for _ in engine.stream("1", streamer=noted, gen_length=30, block_length=1, suppress_eos=True):
            break
        gc.collect()
        assert engine.scheduler.waiting == 0
        never_begun = engine.stream("2", gen_length=40)
        del never_begun
        gc.collect()
        assert engine.scheduler.waiting == 0
        # a row that is not given up would take 30 steps and more
        before = engine.scheduler.nfe
        engine.submit("3", gen_length=2, early_stop=False).answer()
        assert engine.scheduler.nfe - before <= 4
    assert noted.calls[-1] == ("end", [])


def test_a_stream_whose_request_fails_raises_and_ends() -> None:
    noted = Noted()
    engine = Engine(writes(["x", "a", "b"]), TOKENIZER)
    pieces = engine.stream("x", streamer=noted, gen_length=4, block_length=2)
    assert next(pieces) == "ab"
    engine.close()
    with pytest.raises(Cancelled, match="The engine was closed"):
        next(pieces)
    assert noted.calls[-1] == ("end", [])


def test_the_iterator_of_a_ticket_gives_blocks_and_steps() -> None:
    engine = Engine(writes(["x", *"abcd"]), TOKENIZER)
    kinds = [type(event) is CommittedBlock for event in engine.submit("x", watch=True, gen_length=4, block_length=2)]
    assert kinds == [False, False, True, False, False, True]


# --- what is refused

REFUSED = [
    ({"steps": 0}, "steps=0: it is a whole number, at least 1"),
    ({"block_length": 0}, "block_length=0: it is a whole number, at least 1"),
    ({"gen_length": 0}, "gen_length=0: it is a whole number, at least 1"),
    ({"gen_length": 8, "block_length": 9}, "block_length=9 exceeds gen_length=8: give a block_length of at most 8"),
    ({"gen_length": 8, "steps": 9}, "steps=9 exceeds gen_length=8"),
    ({"gen_length": 8, "steps": 3, "block_length": 2}, "steps=3 is fewer than the 4 blocks of block_length=2"),
    (
        {"gen_length": CONTEXT},
        f"need {CONTEXT + 1} positions, and the model's context is {CONTEXT}: shorten the prompt",
    ),
    ({"policy": "treshold"}, "policy='treshold' does not exist. Did you mean 'threshold'?"),
    ({"cache": "duel"}, "cache='duel' does not exist. Did you mean 'dual'?"),
    (
        {"policy": "klass", "gamma": 0.1},
        "gamma=0.1 does not belong to policy='klass': it goes with policy entropy_bound",
    ),
    ({"vicinity": 4}, "vicinity=4 does not belong to cache='none': it goes with cache vicinity"),
    ({"temprature": 0.1}, "There is no sampling option 'temprature'. Did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_bad_settings_are_errors_before_any_work(options: dict[str, Any], message: str) -> None:
    engine = Engine(model(), TOKENIZER)
    ticket = engine.submit("1", gen_length=2, early_stop=False)
    for call in (engine.submit, engine.stream, lambda prompt, **rest: engine.generate(["2", prompt], **rest)):
        with pytest.raises(OptionError, match=re.escape(message)):
            call("1", **{"gen_length": 8, **options})
    assert (engine.scheduler.waiting, engine.scheduler.nfe) == (1, 0)  # nothing of the others is left in line
    assert ticket.answer().steps == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty: give it some text"),
        ("1" * CONTEXT, f"prompt 1 ({CONTEXT} tokens) and gen_length=4 need {CONTEXT + 4} positions"),
        ([1, 5000], "prompt 1 holds the token id 5000"),
    ],
)
def test_one_bad_prompt_of_many_is_named_before_any_work(prompt: Any, message: str) -> None:
    engine = Engine(model(), TOKENIZER)
    with pytest.raises(OptionError, match=re.escape(message)):
        engine.generate(["1", prompt, "2"], gen_length=4)
    assert idle(engine)
    assert engine.scheduler.nfe == 0


def test_a_line_too_short_for_a_batch_is_an_error_that_leaves_nothing_in_it() -> None:
    engine = Engine(model(), TOKENIZER, max_waiting=2)
    with pytest.raises(OptionError, match="2 requests are waiting, the most that max_waiting allows"):
        engine.generate(["1", "2", "3"], gen_length=4)
    assert idle(engine)


def test_a_model_without_a_mask_is_an_error() -> None:
    config = LLaDAConfig(**{**model().config.to_dict(), "mask_token_id": None})
    with pytest.raises(CheckpointError, match="mask_token_id=None and the tokenizer says None"):
        Engine(LLaDAModelLM(config), None)


def test_streaming_text_takes_a_tokenizer_and_the_engine_does_not() -> None:
    engine = Engine(model())
    with pytest.raises(OptionError, match="Streaming text needs a tokenizer"):
        engine.stream([1, 2], gen_length=2)
    assert engine.generate([[7, 8]], gen_length=2).texts == []


def test_weights_that_are_no_numbers_are_an_error_of_the_requests_that_meet_them() -> None:
    damaged = LLaDAModelLM(model().config).double()
    damaged.load_state_dict(model().state_dict())
    bad = TOKENIZER.convert_tokens_to_ids("!")
    with torch.no_grad():
        damaged.get_input_embeddings().weight[bad] = torch.nan
        damaged.get_output_embeddings().weight[bad] = 0.0
    engine = Engine(damaged, TOKENIZER)
    good, failing = (engine.submit(prompt, gen_length=4) for prompt in ("1", "1!"))
    with pytest.raises(NonFiniteError, match="its weights may be damaged"):
        failing.answer()
    assert (
        good.answer().canvas.tolist() == llada.generate(damaged, TOKENIZER, ["1"], gen_length=4).sequences[0].tolist()
    )
    asked = ["2", "1!", "3", "!"]
    text = f"1{MASK * 2}"
    alone = [llada.generate(damaged, TOKENIZER, [asked[row]], gen_length=4, requests=[row]) for row in (0, 2)]
    for sampler in (engine.generate, partial(llada.generate, damaged, TOKENIZER)):
        with pytest.raises(
            NonFiniteError, match=r"Rows 1, 3 of 4: The model's logits .* in this error's `result`"
        ) as caught:
            sampler(asked, gen_length=4)
        assert caught.value.rows == (1, 3)
        assert [caught.value.result.texts[row] for row in (0, 2)] == [one.texts[0] for one in alone]
        assert [caught.value.result.steps[row] for row in (0, 2)] == [one.steps[0] for one in alone]
    with pytest.raises(NonFiniteError, match="Row 1 of 2: ") as caught:
        llada.infilling(damaged, TOKENIZER, [text, f"!{MASK}"])
    assert caught.value.result.texts[0] == llada.infilling(damaged, TOKENIZER, [text]).texts[0]
    assert idle(engine)


@pytest.mark.parametrize("memory_gb", [0, -1, float("nan"), float("inf")])
def test_memory_is_a_number_above_0(memory_gb: float) -> None:
    with pytest.raises(OptionError, match=re.escape(f"memory_gb={memory_gb}: it is a number above 0.")):
        Engine(model(), TOKENIZER, memory_gb=memory_gb)


def test_memory_bounds_the_rows_and_counts_what_caches_keep() -> None:
    engine = Engine(model(), TOKENIZER)
    each = engine._bytes_per_position
    plain, dual = (engine.submit("1", gen_length=3, cache=kept).request.config for kept in ("none", "dual"))
    assert each(dual) - each(plain) == KeyValues.of(model()).bytes_per_position
    row = 4 * each(plain)  # a prompt of one token, and three to write
    small = Engine(model(), TOKENIZER, memory_gb=2.5 * row / 2**30)
    found = small.generate(["1"] * 5, gen_length=3)
    assert small.scheduler.most_rows == 2
    assert found.texts == llada.generate(model(), TOKENIZER, ["1"] * 5, gen_length=3).texts
    with pytest.raises(OptionError, match=r"A row of 40 positions needs .* MiB, and there are .* memory_gb"):
        small.submit("1", gen_length=39)


def test_an_answer_has_its_text() -> None:
    with Engine(model(), TOKENIZER) as engine:
        written, filled = engine.submit(PROMPTS[0], gen_length=6), engine.submit_infilling(f"1{MASK * 3}2")
        assert written.answer().text == llada.generate(model(), TOKENIZER, PROMPTS[:1], gen_length=6).texts[0]
        assert filled.answer().text == llada.infilling(model(), TOKENIZER, [f"1{MASK * 3}2"]).texts[0]
    with Engine(model()) as engine:
        assert engine.submit([1, 2], gen_length=2).answer().text is None


def test_a_streamer_that_shows_no_drafts_is_refused_before_anything_runs() -> None:
    with Engine(model(), TOKENIZER) as engine:
        with pytest.raises(OptionError, match="has not the methods put, put_draft and end"):
            engine.stream("1", gen_length=2, streamer=print)  # type: ignore[arg-type]
        assert idle(engine)
