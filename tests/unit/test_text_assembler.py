from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbinfer.engines.text import TextAssembler, held_back


def run(
    pieces: list[bytes],
    *,
    stop: tuple[str, ...] = (),
    reasoning: bool = False,
    inside: bool = False,
) -> tuple[str, str, bool]:
    assembler = TextAssembler(stop, reasoning=reasoning, inside_reasoning=inside)
    text, thought = "", ""
    for data in pieces:
        piece = assembler.push(data)
        text, thought = text + piece.text, thought + piece.reasoning
        if piece.stopped:
            return text, thought, True
    piece = assembler.finish()
    return text + piece.text, thought + piece.reasoning, piece.stopped


@given(st.text(), st.lists(st.integers(1, 7)))
def test_any_text_cut_anywhere_comes_out_whole(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "replace")
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(data[at : at + cut])
        at += cut
    pieces.append(data[at:])
    assert run(pieces) == (data.decode(), "", False)


def test_half_a_character_is_held_until_it_is_whole() -> None:
    assembler = TextAssembler()
    euro = "€".encode()
    assert assembler.push(euro[:1]).text == ""
    assert assembler.push(euro[1:2]).text == ""
    assert assembler.push(euro[2:]).text == "€"


def test_a_character_that_never_ends_becomes_a_replacement_mark() -> None:
    assert run([b"ok ", "€".encode()[:2]])[0] == "ok \ufffd"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"one ST", b"OP two"], ("STOP",), ("one ", "", True)),
        ([b"one S", b"T", b"O", b"P two"], ("STOP",), ("one ", "", True)),
        ([b"one STO", b"RE"], ("STOP",), ("one STORE", "", False)),
        ([b"aab", b"aac"], ("aaab",), ("aabaac", "", False)),
        ([b"x\n", b"\ny"], ("\n\n",), ("x", "", True)),
        ([b"a END b", b""], ("b", "END"), ("a ", "", True)),
        ([b"ends in STO"], ("STOP",), ("ends in STO", "", False)),
    ],
)
def test_stop_strings_span_tokens_and_never_show(
    pieces: list[bytes],
    stop: tuple[str, ...],
    expected: tuple[str, str, bool],
) -> None:
    assert run(pieces, stop=stop) == expected


@given(st.text("abST", max_size=40), st.lists(st.integers(1, 3), max_size=40))
def test_streamed_text_is_the_text_before_the_first_stop(text: str, cuts: list[int]) -> None:
    pieces, at = [], 0
    for cut in [*cuts, len(text)]:
        pieces.append(text[at : at + cut].encode())
        at += cut
    shown, _, stopped = run(pieces, stop=("STa",))
    assert shown == text.partition("STa")[0]
    assert stopped == ("STa" in text)


@pytest.mark.parametrize(
    ("pieces", "inside", "expected"),
    [
        ([b"<th", b"ink>\nhm", b"m</thi", b"nk>\n\nyes"], False, ("yes", "hmm", False)),
        ([b"\n<think>a</think>b"], False, ("b", "a", False)),
        ([b"no thought"], False, ("no thought", "", False)),
        ([b"<b>bold</b>"], False, ("<b>bold</b>", "", False)),
        ([b"<"], False, ("<", "", False)),
        ([b"still thinking"], True, ("", "still thinking", False)),
        ([b"thought</think>answer"], True, ("answer", "thought", False)),
        ([b"say <think> later"], False, ("say <think> later", "", False)),
    ],
)
def test_reasoning_is_told_apart(pieces: list[bytes], inside: bool, expected: tuple[str, str, bool]) -> None:
    assert run(pieces, reasoning=True, inside=inside) == expected


def test_held_back_is_the_longest_possible_beginning() -> None:
    assert held_back("abcST", ("STOP", "T!")) == 2
    assert held_back("abc", ("STOP",)) == 0
    assert held_back("", ("STOP",)) == 0
