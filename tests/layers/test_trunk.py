"""Around the blocks: positions, documents packed into a row, hidden states, and the head where it is asked for.

Shapes: B batch, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dllm.layers.attention import PackedDocuments, attention_bias
from dllm.layers.rope import rotary_tables
from dllm.layers.trunk import document_positions, encode, logits_at
from dllm.pipelines import llada
from dllm.pipelines.llada import LLaDAConfig

MODELS = (*cases.DENSE, "llada_moe")
LENGTHS = (7, 1, 12, 6)
every_model = pytest.mark.parametrize("name", MODELS)
models_with_most = pytest.mark.parametrize("name", ["llada_dense_gqa_tied", "llada_moe"])
"""For what takes long to compile: what the plain dense model has, one of these has too."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def loaded(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return llada.load_model(cases.folder(name), dtype=dtype)


@pytest.fixture
def model(name: str, kernel: str) -> Iterator[PreTrainedModel]:
    """The golden model under another attention kernel, for one test."""
    given_ = loaded(name)
    before = given_.config._attn_implementation
    given_.config._attn_implementation = kernel
    yield given_
    given_.config._attn_implementation = before


def document_by_document(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a flash kernel does with cumulative lengths, one document and one head at a time."""
    assert attention_mask is None, "flash kernels take no such mask"
    if "cu_seq_lens_q" not in kwargs:
        starts = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    else:
        starts = kwargs["cu_seq_lens_q"]
        assert torch.equal(starts, kwargs["cu_seq_lens_k"])
        assert starts.dtype == torch.int32
        assert query.shape[0] == 1, "one row holds all"
        assert kwargs["max_length_q"] == kwargs["max_length_k"] >= int(starts.diff().max())
    out = torch.empty(query.transpose(1, 2).shape)
    for start, end in zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True):
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            q, k, v = query[:, head, start:end], key[:, shared, start:end], value[:, shared, start:end]
            out[:, start:end, head] = (q @ k.transpose(1, 2) * kwargs["scaling"]).softmax(-1) @ v
    return out, None


@pytest.fixture(autouse=True)
def stand_in_for_flash() -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS["flash_written_out"] = document_by_document
    yield
    del ALL_ATTENTION_FUNCTIONS["flash_written_out"]


def documents(name: str) -> tuple[Tensor, Tensor, list[slice]]:
    """ids [2, 26] and document ids [2, 26], each row four documents; and where they stand."""
    ids = cases.forward_case(name)["input_ids"][:2]
    row = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    places = [slice(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    return ids, torch.stack([row, row + 1]), places


def assert_alone(packed_BLV: Tensor, name: str, places: list[slice], bound: float = 1e-4) -> None:
    """Every document's logits are those that it gives alone."""
    ids = documents(name)[0]
    for row in range(len(ids)):
        for place in places:
            alone = loaded(name)(ids[row : row + 1, place]).logits[0]
            torch.testing.assert_close(packed_BLV[row, place].float(), alone, rtol=0, atol=bound)


def written(ids: list[int]) -> list[int]:
    """Positions from the start of each document, counted."""
    out: list[int] = []
    for place, id_ in enumerate(ids):
        out.append(out[-1] + 1 if place and ids[place - 1] == id_ else 0)
    return out


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1)))
def test_positions_start_anew_in_every_document(ids: list[list[int]]) -> None:
    assert document_positions(torch.tensor(ids)).tolist() == [written(row) for row in ids]


@every_model
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_written_out"])
def test_documents_of_a_row_give_what_they_give_alone(name: str, model: PreTrainedModel) -> None:
    ids, document_ids, places = documents(name)
    assert_alone(model(ids, document_ids=document_ids).logits, name, places)


@pytest.mark.slow  # flex attention compiles a kernel before it runs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own, about each other
@models_with_most
@pytest.mark.parametrize("kernel", ["flex_attention"])
def test_documents_under_flex_attention_give_what_they_give_alone(name: str, model: PreTrainedModel) -> None:
    ids, document_ids, places = documents(name)
    assert_alone(model(ids, document_ids=document_ids).logits, name, places)
    mask = torch.ones_like(ids)
    mask[:, places[-1]] = 0
    assert_alone(model(ids, attention_mask=mask, document_ids=document_ids).logits, name, places[:-1])


@every_model
def test_documents_in_bf16_are_near_what_they_are_alone(name: str) -> None:
    ids, document_ids, places = documents(name)
    rough = loaded(name, torch.bfloat16)  # so few positions take the explicit product
    packed = rough(ids, document_ids=document_ids).logits
    for row in range(2):
        for place in places:
            alone = rough(ids[row : row + 1, place]).logits[0]
            # both are rounded to 8 bits in their own places; a token near the edge between two experts may take the other
            error = (packed[row, place].float() - alone.float()).square().mean().sqrt()
            assert error < 0.03 * alone.float().square().mean().sqrt()


@every_model
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_written_out"])
@pytest.mark.parametrize("hidden", ["a document", "ends of documents"])
def test_padding_among_documents_leaves_no_trace(name: str, model: PreTrainedModel, hidden: str) -> None:
    ids, document_ids, places = documents(name)
    mask = torch.ones_like(ids)
    if hidden == "a document":
        shown = places[:2] + places[3:]
        mask[:, places[2]] = 0
    else:  # of the first one its beginning, of the last one its end
        shown = [slice(3, 7), *places[1:3], slice(20, 24)]
        mask[:, :3] = mask[:, 24:] = 0
    found = []
    for padding in (7, 9):
        padded = torch.where(mask.bool(), ids, padding)
        found.append(model(padded, attention_mask=mask, document_ids=document_ids).logits)
        assert_alone(found[-1], name, shown)
        assert found[-1].isfinite().all()


@every_model
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_written_out"])
def test_an_id_that_comes_again_is_another_document(name: str, model: PreTrainedModel) -> None:
    ids, document_ids, places = documents(name)
    assert_alone(model(ids, document_ids=document_ids % 2).logits, name, places)


@every_model
@pytest.mark.parametrize("kernel", ["sdpa", "flash_written_out"])
def test_one_document_is_the_row_without_documents(name: str, model: PreTrainedModel) -> None:
    ids = documents(name)[0]
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, document_ids=torch.zeros_like(ids)).logits, whole, rtol=0, atol=1e-4)


@settings(max_examples=25)
@given(
    ids=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1))
)
def test_starts_for_flash_are_where_documents_begin(ids: list[list[int]]) -> None:
    config = LLaDAConfig(vocab_size=8, d_model=8, n_heads=2, n_layers=1)
    config._attn_implementation = "flash_written_out"
    document_ids = torch.tensor(ids)
    packed = attention_bias(config, torch.zeros(*document_ids.shape, 8), None, document_ids)
    assert isinstance(packed, PackedDocuments)
    begin = [place for place, position in enumerate(n for row in ids for n in written(row)) if position == 0]
    assert packed.starts.tolist() == [*begin, document_ids.numel()]
    assert packed.longest >= int(packed.starts.diff().max())


# --- the head


HIDDEN = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_run_where_it_is_asked_for(tied: bool) -> None:
    head = nn.Embedding(11, 8) if tied else nn.Linear(8, 11, bias=False)
    everywhere = HIDDEN @ head.weight.T

    def assert_is(logits_to_keep: int | Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(logits_at(head, HIDDEN, logits_to_keep), expected, rtol=0, atol=1e-6)

    assert_is(0, everywhere)
    assert_is(2, everywhere[:, -2:])
    assert_is(torch.tensor([3, 0, 3]), everywhere[:, [3, 0, 3]])
    wanted = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    assert 0 < int(wanted.sum()) < 15
    assert_is(wanted, everywhere[wanted])
    assert_is(torch.zeros_like(wanted), torch.zeros(0, 11))


def test_the_head_sees_no_more_than_was_asked_for() -> None:
    head = nn.Linear(8, 11, bias=False)
    seen: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda module, given_, out: seen.append(tuple(given_[0].shape)))
    wanted = torch.zeros(3, 5, dtype=torch.bool)
    wanted[1, 2] = wanted[0, 4] = True
    for keep in (wanted, 2, torch.tensor([1])):
        logits_at(head, HIDDEN, keep)
    assert seen == [(2, 8), (3, 2, 8), (3, 1, 8)]


# --- encode


class Adds(nn.Module):
    """A block that adds its number, and gives router logits if it is told to."""

    tables: tuple[Tensor, Tensor]
    """Of the last call."""

    def __init__(self, number: float, routes: bool) -> None:
        super().__init__()
        self.number, self.routes = number, routes

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Any) -> Tensor | tuple[Tensor, Tensor]:
        Adds.tables = cos, sin
        out = x + self.number
        return (out, out.flatten(0, 1)[:, :2]) if self.routes else out


def encoded(**changes: Any) -> Any:
    config = LLaDAConfig(vocab_size=8, d_model=4, n_heads=2, n_layers=1)
    config._attn_implementation = "sdpa"
    inputs = dict.fromkeys(("input_ids", "attention_mask", "position_ids", "document_ids", "output_hidden_states"))
    blocks = [Adds(1.0, False), Adds(2.0, True), Adds(4.0, True)]
    given_ = {**inputs, "inputs_embeds": torch.zeros(2, 3, 4), **changes}
    return encode(config, nn.Embedding(8, 4), blocks, nn.Identity(), rotary_dim=2, rope_theta=1e4, **given_)


def test_states_are_kept_on_request_and_router_logits_from_the_blocks_that_give_them() -> None:
    plain, full = encoded(), encoded(output_hidden_states=True)
    assert plain.states is None
    assert [float(state.mean()) for state in full.states] == [0.0, 1.0, 3.0, 7.0]
    for done in (plain, full):
        assert float(done.last.mean()) == 7.0
        assert [tuple(part.shape) for part in done.router_logits] == [(6, 2)] * 2
        assert [float(part.mean()) for part in done.router_logits] == [3.0, 7.0]


@pytest.mark.parametrize(
    ("given_", "positions"),
    [
        ({}, [[0, 1, 2]]),
        ({"document_ids": torch.tensor([[4, 4, 5], [0, 1, 1]])}, [[0, 1, 0], [0, 0, 1]]),
        ({"position_ids": torch.tensor([[7, 5, 3]])}, [[7, 5, 3]]),
        (
            {"position_ids": torch.tensor([[7, 5, 3]]), "document_ids": torch.tensor([[0, 0, 1], [0, 1, 1]])},
            [[7, 5, 3]],
        ),
    ],
)
def test_blocks_get_the_angles_of_these_positions(given_: dict[str, Tensor], positions: list[list[int]]) -> None:
    encoded(**given_)
    for found, expected in zip(Adds.tables, rotary_tables(torch.tensor(positions), 2, 1e4), strict=True):
        assert torch.equal(found, expected)


def test_ids_and_embeddings_exclude_each_other() -> None:
    for wrong in ({"inputs_embeds": None}, {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            encoded(**wrong)


# --- compiled


def assert_compiles(name: str, backend: str, **kwargs: Any) -> None:
    """One graph without a break, for padded rows, packed documents and the positions that are asked for."""
    torch.compiler.reset()
    model, case = llada.load_model(cases.folder(name), **kwargs), cases.forward_case(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids, document_ids, places = documents(name)
    padded, mask = case["padded_input_ids"], case["attention_mask"]
    logits = compiled(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], case["padded_logits"][mask == 1], rtol=0, atol=1e-4)
    assert_alone(compiled(ids, document_ids=document_ids).logits, name, places)
    index = torch.tensor([20, 0, 3])
    kept = compiled(case["input_ids"], logits_to_keep=index).logits
    torch.testing.assert_close(kept, case["logits"][:, index], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llada_dense", "llada_moe"])  # the third below, where a compiler runs
def test_a_forward_is_one_graph(name: str) -> None:
    assert_compiles(name, "eager")


@pytest.mark.parametrize("path", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_a_mixture_is_one_graph_on_every_path_of_a_gpu(path: str) -> None:
    assert_compiles("llada_moe", "eager", experts_implementation=path)


@pytest.mark.slow  # a C++ compiler runs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@models_with_most
def test_a_compiled_forward_gives_the_same_logits(name: str) -> None:
    assert_compiles(name, "inductor")
