"""The front door to sampling: what goes in, in which spelling, and what comes out."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from golden import cases
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.errors import CheckpointError, DataError, OptionError
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig, LLaDAModelLM
from dllm.pipelines.llada.generate import encode_prompt
from dllm.pipelines.llada.tokenizer import EOS, EOT, MASK, char_tokenizer
from dllm.sampling.trace import StepEvent

TOKENIZER = char_tokenizer()
CONTEXT = 64
DENSE_CASES = [(name, case) for name in cases.DENSE for case in cases.sampling_settings(name)]
golden_cases = pytest.mark.parametrize(("name", "case"), DENSE_CASES)


@cache
def golden_model(name: str) -> LLaDAModelLM:
    return llada.load_model(str(cases.folder(name)))


@cache
def model(**changes: Any) -> LLaDAModelLM:
    """Random weights, and the vocabulary of the character tokenizer."""
    torch.manual_seed(0)
    ids = dict(mask_token_id=TOKENIZER.mask_token_id, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=1)
    shape = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64, max_sequence_length=CONTEXT)
    made = LLaDAModelLM(LLaDAConfig(vocab_size=len(TOKENIZER), **{**ids, **shape, **changes})).eval()
    with torch.no_grad():  # logits that differ from one another: no two kernels disagree about which is largest
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
        made.get_output_embeddings().weight[TOKENIZER.mask_token_id] = 0.0  # it never proposes the mask itself
    return made


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]


# --- the published sampler's tokens


@golden_cases
def test_tokens_are_those_of_the_published_sampler(name: str, case: str) -> None:
    prompts, canvases = cases.sampling_case(name, case)
    result = llada.generate(golden_model(name), None, prompts, **cases.sampling_settings(name)[case])
    assert_same(result.sequences, canvases)


SPELLINGS = {
    "max_new_tokens": {"gen_length": "max_new_tokens"},
    "max_tokens": {"gen_length": "max_tokens"},
    "block_size": {"block_length": "block_size"},
    "both": {"gen_length": "max_new_tokens", "block_length": "block_size"},
}


@pytest.mark.parametrize("name", cases.DENSE)
@pytest.mark.parametrize("case", ["case6", "case9"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_golden_settings_may_be_spelt_in_other_ways(name: str, case: str, spelling: str) -> None:
    prompts, canvases = cases.sampling_case(name, case)
    settings = {SPELLINGS[spelling].get(k, k): v for k, v in cases.sampling_settings(name)[case].items()}
    assert_same(llada.generate(golden_model(name), None, prompts, **settings).sequences, canvases)


@pytest.mark.parametrize("name", cases.DENSE[1:])
@pytest.mark.parametrize("case", cases.sampling_settings(cases.DENSE[1]))
def test_golden_settings_that_are_defaults_may_be_left_out(name: str, case: str) -> None:
    prompts, canvases = cases.sampling_case(name, case)
    settings = cases.sampling_settings(name)[case]
    defaults = dict(cfg_scale=0.0, temperature=0.0, remasking="low_confidence")
    defaults |= dict(steps=settings["gen_length"], block_length=settings["gen_length"])
    shorter = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    assert len(shorter) < len(settings)
    assert_same(llada.generate(golden_model(name), None, prompts, **shorter).sequences, canvases)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
@pytest.mark.parametrize("name", cases.DENSE)
def test_ids_may_be_lists_tuples_or_tensors(name: str, kind: Any) -> None:
    prompts, canvases = cases.sampling_case(name, "case11")
    given = [kind(prompt.tolist()) for prompt in prompts]
    result = llada.generate(golden_model(name), None, given, **cases.sampling_settings(name)["case11"])
    assert_same(result.sequences, canvases)
    assert {(x.dtype, x.dim(), str(x.device)) for x in result.sequences} == {(torch.int64, 1, "cpu")}


@pytest.mark.parametrize("name", cases.DENSE)
def test_generation_is_infilling_of_a_masked_tail(name: str) -> None:
    prompts, canvases = cases.sampling_case(name, "case7")
    settings = cases.sampling_settings(name)["case7"]
    tail = torch.full((settings.pop("gen_length"),), 250)
    result = llada.infilling(golden_model(name), None, [torch.cat([x, tail]) for x in prompts], **settings)
    assert_same(result.sequences, canvases)


# --- rows


RAGGED = ["12+34=", "+", "a much longer prompt", "7"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 5, "block_length": 4},
        {"cfg_scale": 0.7},
        {"temperature": 0.8, "remasking": "random", "seed": 3},
    ],
    ids=str,
)
def test_a_row_alone_gives_what_it_gives_in_company(options: dict[str, Any]) -> None:
    together = llada.generate(model(), TOKENIZER, RAGGED, gen_length=8, **options)
    for row, prompt in enumerate(RAGGED):
        alone = llada.generate(model(), TOKENIZER, [prompt], gen_length=8, requests=[row], **options)
        assert_same(alone.sequences, [together.sequences[row]])
        assert alone.texts == [together.texts[row]]


def test_sequences_are_prompt_and_answer_untrimmed() -> None:
    result = llada.generate(model(), TOKENIZER, RAGGED, gen_length=8)
    for prompt, sequence in zip(RAGGED, result.sequences, strict=True):
        assert sequence.shape == (len(prompt) + 8,)
        assert sequence[: len(prompt)].tolist() == ids_of(prompt)
    assert result.new_tokens == [8] * 4
    assert result.trace is None


def test_no_prompts_give_no_rows() -> None:
    result = llada.generate(model(), TOKENIZER, [])
    assert (result.sequences, result.texts, result.nfe, result.tokens_per_forward) == ([], [], 0, 0.0)


def test_a_conversation_goes_through_the_chat_template() -> None:
    messages = [{"role": "user", "content": "1+1"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    results = [llada.generate(model(), TOKENIZER, [prompt], gen_length=4) for prompt in (messages, text, ids_of(text))]
    assert results[0].sequences[0][: len(ids_of(text))].tolist() == ids_of(text)
    for other in results[1:]:
        assert_same(other.sequences, results[0].sequences)
        assert other.texts == results[0].texts


def test_a_mask_in_a_prompt_is_a_token_like_any_other() -> None:
    prompt = f"12{MASK}3{MASK}"
    result = llada.generate(model(), TOKENIZER, [prompt], gen_length=4, trace=True)
    assert result.sequences[0][:5].tolist() == ids_of(prompt)
    assert result.trace.commit_steps(0).tolist()[:5] == [-1] * 5
    assert result.new_tokens == [4]


def test_requests_key_the_noise() -> None:
    options = dict(gen_length=8, temperature=1.0)
    first = llada.generate(model(), TOKENIZER, ["1", "1"], **options)
    assert first.sequences[0].tolist() != first.sequences[1].tolist()
    swapped = llada.generate(model(), TOKENIZER, ["1", "1"], requests=[1, 0], **options)
    assert_same(swapped.sequences, first.sequences[::-1])
    other = llada.generate(model(), TOKENIZER, ["1", "1"], seed=1, **options)
    assert other.sequences[0].tolist() != first.sequences[0].tolist()


# --- texts


def writes(tokens: list[str]) -> LLaDAModelLM:
    """A model that is sure of one token at each position, whatever it is given."""
    made = model(max_sequence_length=CONTEXT + 1)  # a key of its own in the cache
    made = LLaDAModelLM(made.config).eval()
    ids = [TOKENIZER.convert_tokens_to_ids(token) for token in tokens]

    logits_LV = torch.zeros(CONTEXT, len(TOKENIZER))
    logits_LV[torch.arange(len(ids)), ids] = 90.0  # its probability is 1 in fp32, with no digits left for rounding

    def sure(_module: object, args: Any, kwargs: dict[str, Any]) -> Any:
        position_N = kwargs["position_ids"][0][kwargs["logits_to_keep"]]
        readout = kwargs["readout"]
        return args, {**kwargs, "readout": lambda _head, _hidden: readout(torch.nn.Identity(), logits_LV[position_N])}

    made.register_forward_pre_hook(sure, with_kwargs=True)
    return made


@pytest.mark.parametrize("end", [EOS, EOT])
def test_texts_stop_at_the_first_end_token_and_sequences_do_not(end: str) -> None:
    written = ["a", "b", "4", end, "5", EOS, "6", EOT]
    result = llada.generate(writes(written), TOKENIZER, ["12"], gen_length=6, early_stop=False)
    # the prompt stands over the first two
    assert result.texts == ["4"]
    assert result.sequences[0].tolist() == ids_of("12") + TOKENIZER.convert_tokens_to_ids(written[2:])


@pytest.mark.parametrize("end", [EOS, EOT])
def test_a_row_stops_once_all_up_to_its_end_is_written(end: str) -> None:
    written = ["a", "b", "4", end, "5", EOS, "6", EOT]
    result = llada.generate(writes(written), TOKENIZER, ["12"], gen_length=6)
    assert (result.texts, result.steps, result.nfe) == (["4"], [2], 2)  # equally sure: from left to right
    eos = TOKENIZER.eos_token_id
    assert result.sequences[0].tolist() == [*ids_of("12"), *TOKENIZER.convert_tokens_to_ids(["4", end]), *[eos] * 4]


def test_an_answer_that_starts_with_its_end_is_empty_and_one_without_it_is_whole() -> None:
    assert llada.generate(writes(["a", EOT, "1"]), TOKENIZER, ["1"], gen_length=2).texts == [""]
    assert llada.generate(writes(["a", "2", "1"]), TOKENIZER, ["1"], gen_length=2).texts == ["21"]


def test_end_tokens_in_the_prompt_end_nothing() -> None:
    assert llada.generate(writes(["a", "a", "7", EOT]), TOKENIZER, [f"1{EOS}"], gen_length=2).texts == ["7"]


@pytest.mark.parametrize("option", ["suppress_eos", "logits_eos_inf"])
def test_suppressed_end_tokens_are_never_written(option: str) -> None:
    result = llada.generate(writes(["a", EOS, EOS, "1"]), TOKENIZER, ["1"], gen_length=3, **{option: True})
    assert TOKENIZER.eos_token_id not in result.sequences[0].tolist()


@pytest.mark.parametrize("option", ["eos_last", "confidence_eos_eot_inf"])
def test_end_tokens_may_be_committed_last(option: str) -> None:
    options = dict(gen_length=4, trace=True, early_stop=False)
    plain = llada.generate(writes(["a", EOT, "1", EOS, "2"]), TOKENIZER, ["1"], **options)
    assert plain.trace.commit_steps(0).tolist() == [-1, 0, 1, 2, 3]  # equally sure: from left to right
    last = llada.generate(writes(["a", EOT, "1", EOS, "2"]), TOKENIZER, ["1"], **options, **{option: True})
    assert last.trace.commit_steps(0).tolist() == [-1, 2, 0, 3, 1]


def test_without_a_tokenizer_there_are_no_texts() -> None:
    with_it = llada.generate(model(), TOKENIZER, [ids_of("12")], gen_length=4)
    without = llada.generate(model(), None, [ids_of("12")], gen_length=4)
    assert_same(without.sequences, with_it.sequences)
    assert without.texts == []
    assert len(with_it.texts) == 1
    assert llada.infilling(model(), None, [[7, 2, 2]]).texts == []


# --- infilling


def test_infilling_fills_masks_and_leaves_the_rest() -> None:
    inputs = [f"{MASK}1{MASK * 2}23", "nothing to fill", MASK * 3, ""]
    result = llada.infilling(model(), TOKENIZER, inputs)
    for text, sequence, filled in zip(inputs, result.sequences, result.texts, strict=True):
        given = torch.tensor(ids_of(text), dtype=torch.int64)
        keep = given != TOKENIZER.mask_token_id
        assert sequence.shape == given.shape
        assert torch.equal(sequence[keep], given[keep])
        assert TOKENIZER.mask_token_id not in sequence.tolist()
        assert filled == TOKENIZER.decode(sequence.tolist(), skip_special_tokens=True)
    assert result.new_tokens == [3, 0, 3, 0]
    assert result.steps == [3, 0, 3, 0]
    assert result.texts[1] == "nothing to fill"


@pytest.mark.parametrize("name", ["gen_length", "max_new_tokens", "max_tokens"])
def test_infilling_has_no_length_of_its_own(name: str) -> None:
    with pytest.raises(OptionError, match=f"infilling takes no {name}: it writes where the masks of its inputs stand"):
        llada.infilling(model(), TOKENIZER, [MASK], **{name: 4})


@pytest.mark.parametrize("options", [{"length_policy": "daedal"}, {"early_answer": "prophet"}], ids=str)
def test_infilling_has_no_answer_whose_end_could_be_known(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"infilling takes no {name}='{value}': .* Leave out {name}"):
        llada.infilling(model(), TOKENIZER, [MASK], **options)


# --- lengths that are found


def test_an_answer_is_as_long_as_it_turns_out_to_be() -> None:
    growing: dict[str, Any] = dict(length_policy="daedal", initial_length=2, expansion_factor=3, gen_length=9)
    result = llada.generate(model(), TOKENIZER, ["1+1=", "a"], **growing, eos_threshold=1.0, expand_threshold=0.0)
    assert result.new_tokens == [9, 9]
    result = llada.generate(model(), TOKENIZER, ["1+1=", "a"], **growing, eos_threshold=0.0, expand_threshold=0.0)
    assert result.new_tokens == [2, 2]
    assert [len(x) for x in result.sequences] == [6, 3]
    assert not any((x == TOKENIZER.mask_token_id).any() for x in result.sequences)
    with pytest.raises(OptionError, match=r"prompt 0 \(4 tokens\) and gen_length=64 need 68 positions"):
        llada.generate(model(), TOKENIZER, ["1+1="], length_policy="daedal", gen_length=64, initial_length=2)
    with pytest.raises(OptionError, match=r"length_policy='daedal' waits .* no eos_token_id: leave length_policy out"):
        llada.generate(model(eos_token_id=None), TOKENIZER, ["1+1="], **growing)


def test_blocks_end_at_the_tokenizers_line_break() -> None:
    (line_break,) = ids_of("\n")
    settings: dict[str, Any] = dict(
        block_policy="adablock",
        gen_length=12,
        block_length=4,
        delimiter_threshold=0.0,
        early_stop=False,
        temperature=2.0,
    )
    prompts = [f"{n}+{n}=" for n in range(8)]
    result = llada.generate(model(), TOKENIZER, prompts, **settings)
    said = llada.generate(model(), TOKENIZER, prompts, **settings, delimiters=line_break)
    assert_same(result.sequences, said.sequences)
    with pytest.raises(OptionError, match=r"block_policy='adablock' ends blocks at a line break, .* give delimiters"):
        llada.generate(model(), None, [[5, 6]], **settings)
    fixed = {name: value for name, value in settings.items() if name not in ("block_policy", "delimiter_threshold")}
    assert [x.tolist() for x in llada.generate(model(), TOKENIZER, prompts, **fixed).sequences] != [
        x.tolist() for x in result.sequences
    ]
    assert llada.infilling(model(), TOKENIZER, [MASK * 5], block_policy="adablock").new_tokens == [5]


def test_a_known_answer_is_committed_at_once() -> None:
    sure: dict[str, Any] = dict(early_answer="prophet", early_gap=0, middle_gap=0, late_gap=0)
    assert llada.generate(model(), TOKENIZER, ["1+1=", "a"], gen_length=8, **sure).steps == [1, 1]


# --- counts, traces, callbacks


@pytest.mark.parametrize(
    ("options", "nfe", "per_forward"),
    [
        ({}, 8, 1.0),
        ({"steps": 4}, 4, 2.0),
        ({"steps": 3}, 3, 8 / 3),
        ({"steps": 4, "block_length": 4}, 4, 2.0),
        ({"steps": 4, "cfg_scale": 1.0}, 8, 1.0),
    ],
    ids=str,
)
def test_forwards_and_tokens_per_forward_are_counted(options: dict[str, Any], nfe: int, per_forward: float) -> None:
    runs: list[int] = []
    handle = model().register_forward_hook(lambda *_: runs.append(1))
    result = llada.generate(model(), TOKENIZER, ["12", "3"], gen_length=8, **options)
    handle.remove()
    assert result.nfe == nfe
    assert len(runs) == nfe // (2 if options.get("cfg_scale") else 1)  # both branches go in one batch
    assert result.tokens_per_forward == pytest.approx(per_forward)


def test_tokens_per_forward_is_the_mean_over_rows_that_had_something_to_write() -> None:
    result = llada.infilling(model(), TOKENIZER, [MASK * 6, "1", MASK * 2], steps=2)
    assert (result.new_tokens, result.steps) == ([6, 0, 2], [2, 0, 2])
    assert result.tokens_per_forward == pytest.approx((3 + 1) / 2)


def test_the_trace_replays_the_run_and_the_callback_sees_every_step() -> None:
    seen: list[StepEvent] = []
    result = llada.generate(model(), TOKENIZER, RAGGED, gen_length=6, steps=3, trace=True, on_step=seen.append)
    assert [event.step for event in seen] == [0, 1, 2]
    assert len(result.trace.events) == 3
    for event, kept in zip(seen, result.trace.events, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(event[1:], kept[1:], strict=True))
        assert sorted(event.row.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert ((event.confidence > 0) & (event.confidence <= 1)).all()
    for row, prompt in enumerate(RAGGED):
        frames = list(result.trace.frames(row))
        assert frames[0].tolist() == ids_of(prompt) + [TOKENIZER.mask_token_id] * 6
        assert_same([frames[-1]], [result.sequences[row]])
        assert len(frames) == 4


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training: bool) -> None:
    made = LLaDAModelLM(model().config).train(training)
    modes: list[bool] = []
    made.register_forward_hook(lambda module, *_: modes.append(module.training))
    llada.generate(made, TOKENIZER, ["1"], gen_length=2)

    def stop(event: StepEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llada.infilling(made, TOKENIZER, [MASK], on_step=stop)
    assert modes == [False] * 3
    assert made.training is training


# --- errors


def test_a_prompt_that_fills_the_context_is_an_error_before_anything_runs() -> None:
    exact = llada.generate(model(), TOKENIZER, ["1" * (CONTEXT - 4)], gen_length=4, steps=1)
    assert len(exact.sequences[0]) == CONTEXT
    message = (
        f"prompt 1 ({CONTEXT - 3} tokens) and gen_length=4 need {CONTEXT + 1} positions, and the model's context is {CONTEXT}: "
        "shorten the prompt or ask for fewer tokens."
    )
    with pytest.raises(OptionError, match=re.escape(message)):
        llada.generate(model(), TOKENIZER, ["1", "1" * (CONTEXT - 3)], gen_length=4)
    with pytest.raises(OptionError, match=rf"input 0 \({CONTEXT + 1} tokens\) need {CONTEXT + 1} positions"):
        llada.infilling(model(), TOKENIZER, [MASK * (CONTEXT + 1)])


def test_more_steps_than_tokens_and_an_empty_prompt_are_errors() -> None:
    with pytest.raises(OptionError, match=r"steps=9 exceeds gen_length=8: .* so give at most 8 steps"):
        llada.generate(model(), TOKENIZER, ["1"], gen_length=8, steps=9)
    for prompt in ("", []):
        with pytest.raises(OptionError, match=r"prompt 1 is empty: give it some text"):
            llada.generate(model(), TOKENIZER, ["1", prompt], gen_length=8)


@pytest.mark.parametrize("name", ["block_length", "block_size"])
def test_a_block_longer_than_the_answer_is_an_error(name: str) -> None:
    with pytest.raises(OptionError, match=r"block_length=9 exceeds gen_length=8: give a block_length of at most 8"):
        llada.generate(model(), TOKENIZER, ["1"], gen_length=8, **{name: 9})


def test_fewer_steps_than_blocks_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"steps=1 is fewer than the 2 blocks of block_length=4"):
        llada.generate(model(), TOKENIZER, ["1"], gen_length=8, block_length=4, steps=1)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("gen_lenght", "gen_length"), ("max_new_token", "max_new_tokens")],
)
@pytest.mark.parametrize("front_door", [llada.generate, llada.infilling])
def test_a_misspelt_option_names_the_nearest(front_door: Any, wrong: str, right: str) -> None:
    with pytest.raises(OptionError, match=f"There is no sampling option '{wrong}'. Did you mean '{right}'?"):
        front_door(model(), TOKENIZER, ["1"], **{wrong: 1})


def test_two_spellings_of_one_option_are_an_error() -> None:
    with pytest.raises(OptionError, match="'max_tokens' and another spelling of 'gen_length' are both given: keep one"):
        llada.generate(model(), TOKENIZER, ["1"], gen_length=4, max_tokens=4)


@pytest.mark.parametrize("prompt", ["12", [{"role": "user", "content": "1"}]])
def test_text_needs_a_tokenizer(prompt: Any) -> None:
    with pytest.raises(OptionError, match="Prompts of text need a tokenizer: pass one, or pass token ids"):
        llada.generate(model(), None, [prompt], gen_length=2)


@pytest.mark.parametrize(
    "prompt",
    ["12", [7, 8], torch.tensor([7, 8]), [{"role": "user", "content": "1"}]],
    ids=["text", "ids", "tensor", "chat"],
)
@pytest.mark.parametrize("front_door", [llada.generate, llada.infilling])
def test_one_prompt_in_place_of_a_list_is_an_error(front_door: Any, prompt: Any) -> None:
    with pytest.raises(OptionError, match=r"given where a list of them belongs: write \[prompt\]"):
        front_door(model(), TOKENIZER, prompt)


def test_a_prompt_of_ids_has_one_axis() -> None:
    with pytest.raises(
        OptionError, match=r"A prompt of ids has one axis, \[length\], and whole numbers; this one has shape \(1, 2\)"
    ):
        llada.generate(model(), TOKENIZER, [torch.tensor([[7, 8]])])


@pytest.mark.parametrize("front_door", [llada.generate, llada.infilling])
def test_model_and_tokenizer_must_agree_on_the_mask(front_door: Any) -> None:
    with pytest.raises(CheckpointError, match=r"mask_token_id=250 and the tokenizer says 2: they must agree"):
        front_door(golden_model("llada_dense"), TOKENIZER, [[7, 8]])
    with pytest.raises(CheckpointError, match=r"mask_token_id=None and the tokenizer says None: they must agree"):
        front_door(model(mask_token_id=None), None, [[7, 8]])
    assert front_door(model(mask_token_id=None, max_sequence_length=256), TOKENIZER, [[7, 2]], steps=1).sequences


def test_ids_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(OptionError, match="prompt 1 holds the token id 256, and the model has ids 0 to 255"):
        llada.generate(golden_model("llada_dense"), None, [[1], [2, 256]], gen_length=2)
    with pytest.raises(OptionError, match="input 0 holds the token id -1"):
        llada.infilling(golden_model("llada_dense"), None, [[-1, 250]])


def test_arrays_of_numpy_are_prompts_too() -> None:
    import numpy as np

    given = [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [5, 6, 7]]
    a, b, c = llada.generate(golden_model("llada_dense"), None, given, gen_length=4).sequences
    assert torch.equal(a, b)
    assert torch.equal(b, c)
    with pytest.raises(OptionError, match="whole numbers"):
        llada.generate(golden_model("llada_dense"), None, [np.array([0.5])], gen_length=4)


# --- caches


@pytest.mark.parametrize(
    ("options", "exact"),
    [({}, True), ({"cache": "dual"}, False), ({"cache": "delayed", "cache_refresh": 1}, True)],
)
def test_a_result_says_whether_it_is_exact_and_what_it_took(options: dict[str, Any], exact: bool) -> None:
    settings: dict[str, Any] = dict(gen_length=8, block_length=4, steps=4, early_stop=False)
    result = llada.generate(model(), TOKENIZER, ["1+1=", "2"], **settings, **options)
    assert result.exact is exact
    assert (result.nfe, result.steps, result.tokens_per_forward) == (4, [4, 4], 2.0)
    if exact:
        assert_same(result.sequences, llada.generate(model(), TOKENIZER, ["1+1=", "2"], **settings).sequences)


@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity", "delayed"])
def test_a_cache_leaves_given_tokens_and_fills_all_masks(cache: Any) -> None:
    text = "7" + MASK * 3 + "+2" + MASK * 5
    result = llada.infilling(model(), TOKENIZER, [text], block_length=3, cache=cache)
    given = torch.tensor(ids_of(text))
    (found,) = result.sequences
    assert torch.equal(found[given != TOKENIZER.mask_token_id], given[given != TOKENIZER.mask_token_id])
    assert not (found == TOKENIZER.mask_token_id).any()
    assert not result.exact


def test_a_blank_of_n_tokens_is_n_masks() -> None:
    short, long = f"1{MASK * 3}2{MASK}", "1[MASK:3]2[MASK:1]"
    assert_same(*(llada.infilling(model(), TOKENIZER, [text]).sequences for text in (short, long)))
    with pytest.raises(OptionError, match=r"'\[MASK 3\]' is no blank. Did you mean '\[MASK:3\]'"):
        llada.infilling(model(), TOKENIZER, ["1[MASK 3]"])


@pytest.mark.parametrize(
    "prompt",
    [[{"rol": "user"}], ["a text in a list"], [{"role": "user", "content": None}]],
    ids=["role", "text", "content"],
)
def test_what_is_no_conversation_is_told(prompt: Any) -> None:
    with pytest.raises(DataError, match=r"The prompt's messages are .*: they are a list like \[\{.role"):
        encode_prompt(TOKENIZER, prompt)


def test_a_conversation_that_the_template_refuses_is_told_and_one_without_a_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles take turns') }}"
    with pytest.raises(OptionError, match="The chat template refuses this conversation: roles take turns"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    tokenizer.chat_template = None
    with pytest.raises(OptionError, match="has no chat template for a conversation: give a prompt of plain text"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cfg_keep_tokens", {"cfg_scale": 1.0, "cfg_keep_tokens": (1, 9999)}),
        ("delimiters", {"block_policy": "adablock", "delimiters": (9999,)}),
    ],
)
def test_ids_of_options_are_the_models(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{name} holds the token id 9999, and the model has ids 0 to "):
        llada.generate(model(), TOKENIZER, ["12"], gen_length=4, **options)
