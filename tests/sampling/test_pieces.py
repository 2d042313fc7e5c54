"""The texts of tokens: joined they are the text of the run, also where a character is spread over several."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.pipelines.llada.tokenizer import bpe_tokenizer
from dllm.sampling.pieces import HALF, TokenPieces

TOKENIZER = bpe_tokenizer(["the sea is grey, the sky is wide"], 300)
letters = st.text(st.characters(codec="utf-8"), max_size=30)


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@given(letters)
def test_pieces_of_a_text_are_the_text(text: str) -> None:
    ids = ids_of(text)
    pieces = TokenPieces(decode)(ids)
    assert len(pieces) == len(ids)
    assert "".join(map(str, pieces)) == decode(ids)
    if HALF not in text:
        assert not any(HALF in str(piece) for piece in pieces)


@given(letters, st.data())
def test_masks_stay_and_whole_characters_around_them_are_whole(text: str, data: st.DataObject) -> None:
    ids = ids_of(text)
    hidden = data.draw(st.sets(st.integers(0, max(0, len(ids) - 1))))
    canvas = [None if place in hidden else token for place, token in enumerate(ids)]
    pieces = TokenPieces(decode)(canvas)
    assert [piece is None for piece in pieces] == [token is None for token in canvas]
    whole = TokenPieces(decode)(ids)
    for place, piece in enumerate(pieces):
        if piece and HALF not in piece:
            assert whole[place] == piece, "a character that is whole stands where it stands without masks"


def test_half_a_character_shows_until_the_other_half_is_there() -> None:
    split = TokenPieces(decode)
    moon, *rest = ids_of("\N{FULL MOON SYMBOL}")
    assert len(rest) == 3
    assert split([moon, None, *rest[1:]]) == [HALF, None, HALF, HALF]
    assert split([moon, *rest]) == ["\N{FULL MOON SYMBOL}", "", "", ""]
    assert split([*rest, moon, *ids_of("the")]) == [HALF, HALF, HALF, HALF, "the"]


def test_a_blank_at_the_start_of_a_piece_is_kept_by_decoders_that_drop_it_at_the_start_of_a_text() -> None:
    words = ["", " the", " sea"]

    def drops(ids: list[int]) -> str:
        return "".join(words[token] for token in ids).removeprefix(" ")

    assert TokenPieces(drops)([1, 2, None, 2, 1]) == ["the", " sea", None, "sea", " the"]


@pytest.mark.parametrize("canvas", [[], [None], [None, None]])
def test_nothing_is_decoded_where_there_is_nothing(canvas: list[int | None]) -> None:
    def never(ids: list[int]) -> str:
        raise AssertionError(ids)

    assert TokenPieces(never)(canvas) == canvas
