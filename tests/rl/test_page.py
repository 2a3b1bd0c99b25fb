"""The page of rollouts is whole, escaped and free of anything that would be fetched."""

from html.parser import HTMLParser

from PIL import Image

from megatron_vl.rl.page import SHOWN_CHARACTERS, ShownPrompt, ShownResponse, rollout_page


class Seen(HTMLParser):
    """Tags, sources of images and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page():
    hostile = "<script>alert(1)</script> & </pre>"
    responses = [
        ShownResponse("red", 2, "stop", 1.0, False, 0.5, {"exact": 1.0}),
        ShownResponse(hostile, 7, "length", 0.0, False, -0.5, note="truncated"),
        ShownResponse("blue", 2, "stop", 0.0, True, None, note="judge <down>"),
    ]
    picture = Image.new("RGBA", (900, 300), "red")
    page = rollout_page("iteration 3", [ShownPrompt("q<1>", "colour", hostile, "red", [picture], responses)])
    seen = Seen(page)
    assert "script" not in seen.tags and seen.text.count("<script>alert(1)</script>") == 2
    assert seen.tags.count("tr") == 4 and seen.tags.count("img") == 1
    assert all(source.startswith("data:image/jpeg;base64,") for source in seen.sources)
    for text in ("q<1>", "+0.500", "-0.500", "judge <down>", "masked", "exact 1"):
        assert text in seen.text


def test_the_middle_of_a_long_response_is_left_out_and_counted():
    response = ShownResponse("a" * SHOWN_CHARACTERS + "b" * 10, 5, "stop", 0.0, False, 0.0)
    text = Seen(rollout_page("t", [ShownPrompt("p", "", "q", "x", [], [response])])).text
    assert "[... 10 characters ...]" in text and "b" * 10 in text
