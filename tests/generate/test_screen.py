"""Streaming to the console."""

from megatron_vl.generate.request import LENGTH, STOP, Response
from megatron_vl.generate.screen import Screen

END = 300


def text(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def response(ids, index: int = 0, reason: str = STOP) -> Response:
    return Response("prompt", index, 7 + index, "abcd", tuple(ids), (0.0,) * len(ids), reason)


def test_text_comes_as_it_is_drawn_and_characters_come_whole(capsys):
    screen = Screen(text, (END,))
    seen = []
    for token in [*"é☂ok".encode(), END]:
        screen.show(0, token)
        screen.show(1, 65)  # another request's
        seen.append(capsys.readouterr().out)
    assert seen == ["", "é", "", "", "☂", "o", "k", ""]
    screen.finish([response([*"é☂ok".encode(), END]), response([66, 67], 1, LENGTH)])
    out, err = capsys.readouterr()
    assert out == "\nBC\n"
    assert "--- response 2, seed 8" in err and "10 tokens in" in err
    assert "ended by: stop, length; weights abcd" in err


def test_a_response_of_another_rank_or_one_that_was_cut_is_printed_at_the_end(capsys):
    screen = Screen(text, (END,))
    screen.show(0, "☂".encode()[0])
    screen.finish([response("☂".encode()[:1], reason=LENGTH)])
    assert capsys.readouterr().out == "\ufffd\n"
    Screen(text, (END,)).finish([response(b"whole")])
    assert capsys.readouterr().out == "whole\n"
