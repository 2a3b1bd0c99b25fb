r"""Responses and what the verifiers make of them: (name, task, response, expected).

task: the record of a prompt. expected: a score, or the reason of a malformed response, or `ERROR` + the reason of a
verifier error. Responses think first unless the name says otherwise.
"""

from __future__ import annotations

ERROR = "error: "
THINKING = "<think>Let me see.</think>\n"


def said(answer: str) -> str:
    return THINKING + answer


def boxed(answer: str) -> str:
    return said(rf"The answer is \boxed{{{answer}}}.")


def exact(answer: object = "Eiffel Tower", **more: object) -> dict:
    return {"kind": "exact", "answer": answer, **more}


def choice(answer: object = "B", **more: object) -> dict:
    return {"kind": "choice", "answer": answer, "choices": ["red", "green", "blue", "a grey cat"], **more}


def maths(answer: str = "5") -> dict:
    return {"kind": "math", "answer": answer}


def numeric(answer: float = 5, **more: object) -> dict:
    return {"kind": "numeric", "answer": answer, **more}


def count(answer: int = 3) -> dict:
    return {"kind": "count", "answer": answer}


def place(kind: str, answer: object, coordinates: str = "pixel", **more: object) -> dict:
    return {"kind": kind, "answer": answer, "coordinates": coordinates, "image_size": [400, 300], **more}


BOX = place("box", [[100, 100, 200, 200]])
TWO_BOXES = place("box", [[0, 0, 100, 100], [200, 100, 300, 200]])
POINT = place("point", [100, 100])  # the diagonal is 500, so nothing is left at 50 pixels
TRIANGLE = place("polygon", [[0, 0], [100, 0], [0, 100]])
CLICK = place("gui", {"action": "click", "point": [100, 100]})
BUTTON = place("gui", {"action": "click", "point": [90, 90, 110, 110]})
TYPE = place("gui", {"action": "type", "text": "hello"})
SCROLL = place("gui", {"action": "scroll", "direction": "down"})
FORMAT = {"kind": "format", "boxed": True}
NO_THINKING = exact("red", thinking=False)

THINKING_CASES = [
    ("answer after thinking", exact("red"), said("red"), 1),
    ("thinking opened by the prompt", exact("red"), "I see red.</think>red", 1),
    ("thinking not closed", exact("red"), "<think>It is red. red", "unclosed_think"),
    ("no thinking at all", exact("red"), "red", "unclosed_think"),
    ("thinking opened again", exact("red"), "<think>a</think>red<think>or blue", "unclosed_think"),
    ("text after the last end counts", exact("red"), "<think>a</think>blue</think>red", 1),
    ("box in the thinking only", maths("12"), r"<think>\boxed{12}</think>It is thirteen.", "no_box"),
    ("box in the thinking, another after", maths("12"), r"<think>\boxed{12}</think>\boxed{13}", 0),
    ("nothing after thinking", exact("red"), "<think>red</think>  \n", "no_answer"),
    ("nothing but the end of turn", exact("red"), "<think>red</think><|im_end|>", "no_answer"),
    ("end of turn after the answer", exact("red"), said("red<|im_end|>"), 1),
    ("empty response", exact("red"), "", "unclosed_think"),
    ("thinking not asked", NO_THINKING, "red", 1),
    ("thinking not asked, done", NO_THINKING, said("red"), 1),
    ("thinking not asked, not closed", NO_THINKING, "<think>red", "unclosed_think"),
    ("thinking not asked, empty", NO_THINKING, " ", "no_answer"),
]

EXACT_CASES = [
    ("exact", exact(), boxed("Eiffel Tower"), 1),
    ("exact, other case and spaces", exact(), boxed(" eiffel\n tower. "), 1),
    ("exact, case matters", exact(case_sensitive=True), boxed("eiffel tower"), 0),
    ("exact, alias", exact(["Eiffel Tower", "La tour Eiffel"]), boxed("la tour eiffel"), 1),
    ("exact, wrong", exact(), boxed("Big Ben"), 0),
    ("exact, hedged", exact(), boxed("Eiffel Tower or Big Ben"), 0),
    ("exact, by cue", exact(), said("It stands in Paris.\n**Answer:** Eiffel Tower"), 1),
    ("exact, two cues", exact(), said("Answer: Eiffel Tower\nAnswer: Big Ben"), "several_answers"),
    ("exact, one cue repeated", exact(), said("Answer: Eiffel Tower\nAnswer: Eiffel  Tower"), 1),
    ("exact, many lines", exact(), said("Eiffel\nTower"), "no_answer"),
    ("exact, box asked", exact(boxed=True), said("Eiffel Tower"), "no_box"),
    ("exact, two boxes", exact("4"), said(r"\boxed{4} or \boxed{5}"), "several_answers"),
    ("exact, two boxes alike", exact("4"), said(r"\boxed{4}, so \boxed{ 4 }"), 1),
    ("exact, box not closed", exact("4"), said(r"\boxed{4} and \boxed{4"), "unbalanced_box"),
    ("exact, box without braces", exact("4"), said(r"\boxed 4"), "unbalanced_box"),
    ("exact, box in a box", exact("4"), said(r"\boxed{\boxed{4}}"), "nested_box"),
    ("exact, ten thousand boxes in boxes", exact("4"), said(r"\boxed{" * 10_000), "nested_box"),
    ("exact, empty box", exact("4"), said(r"\boxed{ }"), "no_answer"),
    ("exact, full width", exact("ABC 12"), boxed("\uff21\uff22\uff23\u3000\uff11\uff12"), 1),
    ("exact, Cyrillic look-alike", exact("ABC"), boxed("\u0410BC"), 0),
    ("exact, zero-width characters", exact("ABC"), boxed("A\u200bB\u2060C"), 1),
    ("exact, text running backwards", exact("ABC"), boxed("\u202eCBA"), 0),
    ("exact, too long", exact(), boxed("Eiffel Tower " * 100), "too_long"),
    ("exact, half a million characters", exact(), said("a " * 250_000), "too_long"),
    ("exact, grows when normalised", exact("x"), boxed("\ufdfa" * 100), "too_long"),
    ("exact, lone surrogate", exact("x"), boxed("\ud800"), 0),
]

CHOICE_CASES = [
    ("choice, box", choice(), boxed("B"), 1),
    ("choice, small letter", choice(), boxed("b"), 1),
    ("choice, brackets", choice(), boxed("(B)"), 1),
    ("choice, dollars", choice(), said("Answer: $B$"), 1),
    ("choice, text command", choice(), boxed(r"\text{B}"), 1),
    ("choice, bold cue", choice(), said("The answer is **(B)**."), 1),
    ("choice, with its text", choice(), boxed("B. green"), 1),
    ("choice, text alone", choice(), boxed("Green"), 1),
    ("choice, text that begins like a letter", choice("D"), boxed("a grey cat"), 1),
    ("choice, article is no letter", choice("A"), boxed("a dog"), "no_choice"),
    ("choice, wrong", choice(), boxed("C"), 0),
    ("choice, full width", choice(), boxed("\uff22"), 1),
    ("choice, Cyrillic look-alike", choice(), boxed("\u0412"), "no_choice"),
    ("choice, with the text of another", choice(), boxed("B. blue"), "contradiction"),
    ("choice, hedged", choice(), boxed("B or C"), "several_answers"),
    ("choice, hedged in a sentence", choice(), said("The answer is B or maybe C."), "several_answers"),
    ("choice, all letters", choice(), boxed("A, B, C, D"), "several_answers"),
    ("choice, not offered", choice(), boxed("E"), "no_choice"),
    ("choice, explained in the box", choice(), boxed("B. it looks so"), "extra_text"),
    ("choice, word", choice(), boxed("yes"), "no_choice"),
    ("choice, several right", choice(["A", "C"]), boxed("A, C"), 1),
    ("choice, several right, other spelling", choice(["A", "C"]), boxed("CA"), 1),
    ("choice, several right, one given", choice(["A", "C"]), boxed("A"), 0),
    ("choice, several right, all given", choice(["A", "C"]), boxed("A, B and C"), 0),
]

MATH_CASES = [
    ("math", maths(r"\frac{1}{2}"), boxed("0.5"), 1),
    ("math, equal form", maths(r"2\sqrt{3}"), boxed(r"\sqrt{12}"), 1),
    ("math, expanded", maths("x^2+2x+1"), boxed("(x+1)^2"), 1),
    ("math, wrong", maths(), boxed("6"), 0),
    ("math, hedged", maths(), boxed("5 or 6"), 0),
    ("math, two values", maths(), boxed("5, 6"), 0),
    ("math, set in any order", maths(r"\{1,2\}"), boxed(r"\{2,1\}"), 1),
    ("math, interval is no pair", maths("(1,2)"), boxed("[1,2]"), 0),
    ("math, pi is not 3.14159", maths(r"\pi"), boxed("3.14159"), 0),
    ("math, thousands", maths("1000"), boxed("1,000"), 1),
    ("math, full width", maths("13"), boxed("\uff11\uff13"), 1),
    ("math, raised digit", maths("100"), boxed("10\u00b2"), 1),
    ("math, raised digit is no digit", maths("102"), boxed("10\u00b2"), 0),
    ("math, mathematical bold", maths("13"), boxed("\U0001d7cf\U0001d7d1"), 1),
    ("math, minus sign", maths("-5"), boxed("\u22125"), 1),
    ("math, without box", maths(), said("5"), "no_box"),
    ("math, two boxes, last right", maths(), said(r"\boxed{4} \boxed{5}"), "several_answers"),
    ("math, unknown command", maths(), boxed(r"\foo{5}"), "not_mathematics"),
    ("math, Python", maths(), boxed("__import__('os').system('touch injected')"), "not_mathematics"),
    ("math, Python in text", maths(), boxed(r"\text{__import__('os').system('touch injected')}"), 0),
    ("math, file of TeX", maths(), boxed(r"\input{/etc/passwd}"), "not_mathematics"),
    ("math, TeX writes", maths(), boxed(r"\immediate\write18{touch injected}"), "not_mathematics"),
    ("math, TeX repeats itself", maths(), boxed(r"\def\x{\x\x}\x"), "not_mathematics"),
    ("math, infinity", maths(), boxed(r"\infty"), 0),
    ("math, divides by zero", maths(), boxed(r"\frac{1}{0}"), 0),
    ("math, tower", maths(), boxed("9^{9^{9^9}}"), "hostile"),
    ("math, 10^9 digits", maths(), boxed("10^{1000000000}"), "hostile"),
    ("math, factorial", maths(), boxed("1000000!"), "hostile"),
    ("math, deep brackets", maths(), boxed("(" * 200 + "5" + ")" * 200), "hostile"),
    ("math, 500 digits", maths(), boxed("9" * 500), 0),
    ("math, 600 digits", maths(), boxed("9" * 600), "too_long"),
    ("math, gold is no mathematics", maths(r"\foo{5}"), boxed("5"), ERROR + "gold_not_mathematics"),
]

NUMERIC_CASES = [
    ("number", numeric(), boxed("5.0"), 1),
    ("number, wrong", numeric(), boxed("5.1"), 0),
    ("number, within tolerance", numeric(abs_tolerance=0.2), boxed("5.1"), 1),
    ("number, at the relative tolerance", numeric(100, rel_tolerance=0.05), boxed("105"), 1),
    ("number, beyond it", numeric(100, rel_tolerance=0.05), boxed("105.1"), 0),
    ("number, thousands", numeric(1234567), boxed("1,234,567"), 1),
    ("number, thousands of TeX", numeric(1234), boxed(r"1{,}234"), 1),
    ("number, bad thousands", numeric(1234), boxed("12,34"), "several_answers"),
    ("number, fraction", numeric(0.75), boxed(r"\frac{3}{4}"), 1),
    ("number, slash", numeric(-0.75), boxed("-3/4"), 1),
    ("number, mixed fraction", numeric(2.5), boxed("2\u00bd"), 1),
    ("number, fraction by zero", numeric(), boxed("5/0"), "not_finite"),
    ("number, powers of ten", numeric(5.2e-7), boxed(r"5.2 \times 10^{-7}"), 1),
    ("number, exponent", numeric(5.2e-7), boxed("5.2e-7"), 1),
    ("number, percent", numeric(0.5), boxed(r"50\%"), 1),
    ("number, percent as unit", numeric(50, units=["%"]), boxed("50%"), 1),
    ("number, unit", numeric(units=["cm"]), boxed(r"5\text{ cm}"), 1),
    ("number, other unit", numeric(units=["cm"]), boxed("5 km"), "not_a_number"),
    ("number, currency", numeric(), boxed(r"\$5"), 1),
    ("number, in a line", numeric(), said("The height is 5."), 1),
    ("number, Arabic digits", numeric(35), boxed("\u0663\u0665"), 1),
    ("number, letter O", numeric(10), boxed("1O"), "not_a_number"),
    ("number, NaN", numeric(), boxed("NaN"), "not_finite"),
    ("number, inf", numeric(), boxed("-inf"), "not_finite"),
    ("number, infinity sign", numeric(), boxed("\u221e"), "not_finite"),
    ("number, overflow", numeric(), boxed("1e1000000000"), "not_finite"),
    ("number, 400 digits", numeric(), boxed("5" * 400), "number_too_long"),
    ("number, or", numeric(), boxed("5 or 6"), "several_answers"),
    ("number, range", numeric(), boxed("5-6"), "several_answers"),
    ("number, about", numeric(), said("about 5"), "hedged"),
    ("number, not", numeric(), said("The answer is not 5"), "hedged"),
    ("number, at least", numeric(), said("at least 5"), "hedged"),
    ("number, two in a line", numeric(), said("5 of 7"), "several_answers"),
    ("number, power", numeric(5), said("5^1"), "several_answers"),
    ("number, code", numeric(), boxed("int('5')"), "not_a_number"),
    ("count", count(), boxed("3"), 1),
    ("count, word", count(), said("Three."), 1),
    ("count, wrong", count(), boxed("4"), 0),
    ("count, half", count(), boxed("3.5"), "not_a_count"),
    ("count, negative", count(), boxed("-3"), "not_a_count"),
    ("count, sentence", count(), said("There are 3 dogs."), 1),
    ("count, two", count(), said("There are 3 or 4 dogs."), "several_answers"),
]

PLACE_CASES = [
    ("box", BOX, said("[100, 100, 200, 200]"), 1),
    ("box, half", BOX, said("[100, 100, 200, 150]"), 0.5),
    ("box, JSON", BOX, said('```json\n[{"bbox_2d": [100, 100, 200, 200], "label": "dog"}]\n```'), 1),
    ("box, corners", BOX, said("(100, 100), (200, 200)"), 1),
    ("box, in a box", BOX, boxed("[100, 100, 200, 200]"), 1),
    ("box, far", BOX, said("[300, 210, 400, 300]"), 0),
    ("box, decimals", BOX, said("[100.0, 1e2, 200., 200]"), 1),
    ("box, NaN", BOX, said("[nan, nan, nan, nan]"), "not_finite"),
    ("box, one NaN", BOX, said("[100, NaN, 200, 200]"), "not_finite"),
    ("box, infinite", BOX, said("[-inf, -inf, inf, inf]"), "not_finite"),
    ("box, Infinity", BOX, said("[0, 0, Infinity, Infinity]"), "not_finite"),
    ("box, overflow", BOX, said("[0, 0, 1e999, 1e999]"), "not_finite"),
    ("box, swapped", BOX, said("[200, 200, 100, 100]"), "swapped_corners"),
    ("box, swapped in x", BOX, said("[200, 100, 100, 200]"), "swapped_corners"),
    ("box, no area", BOX, said("[100, 100, 100, 200]"), "swapped_corners"),
    ("box, outside", BOX, said("[100, 100, 401, 200]"), "out_of_image"),
    ("box, negative", BOX, said("[-1, 100, 200, 200]"), "out_of_image"),
    ("box, clipped", {**BOX, "clip": True, "answer": [100, 100, 400, 300]}, said("[100, 100, 999, 999]"), 1),
    ("box, clipped to nothing", {**BOX, "clip": True}, said("[500, 100, 600, 200]"), "swapped_corners"),
    ("box, three numbers", BOX, said("[100, 100, 200]"), "wrong_count"),
    ("box, five numbers", BOX, said("[100, 100, 200, 200, 1]"), "wrong_count"),
    ("box, word inside", BOX, said("[100, 100, 200, x]"), "not_a_number"),
    ("box, arithmetic", BOX, said("[100, 100, 100+100, 200]"), "not_a_number"),
    ("box, two", BOX, said("[100, 100, 200, 200] or [0, 0, 50, 50]"), "several_answers"),
    ("box, the same twice", BOX, said("[100, 100, 200, 200], that is [100, 100, 200, 200]"), 1),
    ("box, many digits", BOX, said(f"[{'1' * 40}, 100, 200, 200]"), "number_too_long"),
    ("box, none", BOX, said("on the left"), "no_coordinates"),
    ("box, too long", BOX, said("[100, 100, 200, 200]" * 300), "too_long"),
    ("box, prose in brackets", BOX, said("The dog (brown, large) is at [100, 100, 200, 200]."), 1),
    ("box, brackets never closed", BOX, said("[" * 4000), "no_coordinates"),
    (
        "box, 0-1000",
        {**BOX, "coordinates": "0-1000", "answer": [[0, 0, 500, 500]]},
        said("[0,0,500,250]"),
        0.5,
    ),
    ("box, 0-1", {**BOX, "coordinates": "0-1", "answer": [[0, 0, 0.5, 0.5]]}, said("[0,0,.5,.5]"), 1),
    (
        "box, pixels for 0-1",
        {**BOX, "coordinates": "0-1", "answer": [[0, 0, 1, 1]]},
        said("[0,0,9,9]"),
        "out_of_image",
    ),
    ("box, below the floor", {**BOX, "floor": 0.5}, said("[100, 100, 200, 150]"), 0),
    ("box, above the floor", {**BOX, "floor": 0.5, "power": 2}, said("[100, 100, 200, 175]"), 0.25),
    ("boxes", TWO_BOXES, said("[200, 100, 300, 200], [0, 0, 100, 100]"), 1),
    ("boxes, one missing", TWO_BOXES, said("[0, 0, 100, 100]"), 0.5),
    ("boxes, one too many", TWO_BOXES, said("[0,0,100,100] [200,100,300,200] [0,0,9,9]"), 2 / 3),
    ("boxes, one repeated", TWO_BOXES, said("[0,0,100,100] [0,0,100,100]"), 0.5),
    ("boxes, a hundred", TWO_BOXES, said("[0,0,9,9]" * 100), "too_many"),
    ("point", POINT, said("(100, 100)"), 1),
    ("point, half the radius", POINT, said("(115, 120)"), 0.5),
    ("point, beyond the radius", POINT, said("(100, 151)"), 0),
    ("point, NaN", POINT, said("(nan, 100)"), "not_finite"),
    ("point, outside", POINT, said("(100, 301)"), "out_of_image"),
    ("point, two", POINT, said("(100, 100) or (0, 0)"), "several_answers"),
    ("point, a box", POINT, said("[90, 90, 110, 110]"), "wrong_count"),
    ("polygon", TRIANGLE, said("[[0, 0], [100, 0], [0, 100]]"), 1),
    ("polygon, other order", TRIANGLE, said("[[0, 100], [100, 0], [0, 0]]"), 1),
    ("polygon, flat list", TRIANGLE, said("[0, 0, 100, 0, 0, 100]"), 1),
    ("polygon, half", TRIANGLE, said("[[0, 0], [50, 0], [0, 100]]"), 0.5),
    ("polygon, bow tie", TRIANGLE, said("[[0,0],[100,100],[100,0],[0,100]]"), "bad_polygon"),
    ("polygon, no area", TRIANGLE, said("[[0,0],[50,50],[100,100]]"), "bad_polygon"),
    ("polygon, two corners", TRIANGLE, said("[[0,0],[100,100]]"), "wrong_count"),
    ("polygon, NaN", TRIANGLE, said("[[0,0],[100,nan],[0,100]]"), "not_finite"),
    ("polygon, outside", TRIANGLE, said("[[0,0],[1000,0],[0,100]]"), "out_of_image"),
]

GUI_CASES = [
    ("click", CLICK, said('{"action": "click", "point": [100, 100]}'), 1),
    ("click, fenced", CLICK, said('```json\n{"action": "click", "point": [100, 100]}\n```'), 1),
    ("click, near", CLICK, said('{"action": "click", "point": [115, 120]}'), 0.5),
    ("click, on the button", BUTTON, said('{"action": "click", "point": [91, 109]}'), 1),
    ("click, beside the button", BUTTON, said('{"action": "click", "point": [89, 100]}'), 0),
    ("click, another action", CLICK, said('{"action": "wait"}'), 0),
    ("click, outside", CLICK, said('{"action": "click", "point": [100, 1000]}'), "out_of_image"),
    ("click, NaN", CLICK, said('{"action": "click", "point": [NaN, 100]}'), "not_finite"),
    ("click, overflow", CLICK, said('{"action": "click", "point": [1e999, 100]}'), "not_finite"),
    (
        "click, many digits",
        CLICK,
        said('{"action": "click", "point": [%s, 1]}' % ("1" * 50)),
        "number_too_long",
    ),
    ("click, a string", CLICK, said('{"action": "click", "point": "100, 100"}'), "wrong_parameters"),
    ("click, true", CLICK, said('{"action": "click", "point": [true, 100]}'), "wrong_parameters"),
    ("click, no point", CLICK, said('{"action": "click"}'), "wrong_parameters"),
    (
        "click, one key more",
        CLICK,
        said('{"action": "click", "point": [100, 100], "x": 1}'),
        "wrong_parameters",
    ),
    (
        "click, key twice",
        CLICK,
        said('{"action": "wait", "action": "click", "point": [1, 1]}'),
        "duplicate_key",
    ),
    ("action, unknown", CLICK, said('{"action": "rm -rf"}'), "unknown_action"),
    ("action, a list", CLICK, said('[{"action": "click", "point": [1, 1]}]'), "not_an_object"),
    ("action, two", CLICK, said('{"action": "wait"} {"action": "wait"}'), "broken_json"),
    ("action, prose before", CLICK, said('I click: {"action": "wait"}'), "broken_json"),
    ("action, Python", CLICK, said("{'action': 'wait'}"), "broken_json"),
    ("action, deep", CLICK, said("[" * 2000 + "]" * 2000), "json_too_deep"),
    ("action, deep and never closed", CLICK, said('{"a":' * 800), "json_too_deep"),
    ("action, long", CLICK, said('{"action": "%s"}' % ("a" * 5000)), "too_long"),
    ("type", TYPE, said('{"action": "type", "text": "Hello"}'), 1),
    ("type, wrong", TYPE, said('{"action": "type", "text": "bye"}'), 0),
    ("scroll", SCROLL, said('{"action": "scroll", "direction": "down"}'), 1),
    ("scroll, sideways", SCROLL, said('{"action": "scroll", "direction": "in"}'), "wrong_parameters"),
]

FORMAT_CASES = [
    ("format", FORMAT, said(r"So \boxed{5}"), 1),
    ("format, no box", FORMAT, said("So 5"), "no_box"),
    ("format, thinking twice", FORMAT, said("<think>a</think>" + r"\boxed{5}"), "format"),
    ("format, text before thinking", FORMAT, "Well, " + said(r"\boxed{5}"), "format"),
    ("format, no thinking asked", {"kind": "format", "thinking": False}, said("5"), "format"),
]

CASES = [
    *THINKING_CASES,
    *EXACT_CASES,
    *CHOICE_CASES,
    *MATH_CASES,
    *NUMERIC_CASES,
    *PLACE_CASES,
    *GUI_CASES,
    *FORMAT_CASES,
]
