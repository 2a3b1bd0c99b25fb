"""Rows of the table of verdicts on numbers, in mathematics and alone: see `cases.py`."""

from __future__ import annotations

from tests.rl.rewards.records import boxed, count, maths, numeric, said


def small_numbers() -> list[tuple]:
    """math-verify rounds to six decimal places: gold, answer, score."""
    table = [
        (r"1.6\times 10^{-19}", r"9.1\times 10^{-31}", 0),
        (r"1.67\times 10^{-27}", r"9.11\times 10^{-31}", 0),
        (r"6.63\times 10^{-34}", r"3.3\times 10^{-34}", 0),
        (r"1.2\times 10^{-10}", "0.0", 0),
        ("0.0000016", "0.0000019", 0),
        ("0.001", "0.0010004", 0),
        ("(1.6\\times 10^{-19}, 2)", "(9.1\\times 10^{-31}, 2)", 0),
        (r"\{1.6\times 10^{-19}, 2\}", r"\{2, 9.1\times 10^{-31}\}", 0),
        (r"x=1.6\times 10^{-19}", r"9.1\times 10^{-31}", 0),
        (r"1.6\times 10^{-19}x", r"9.1\times 10^{-31}x", 0),
        (r"\frac{\sqrt2}{10^{20}}", r"\frac{\sqrt3}{10^{20}}", 0),
        (r"\begin{pmatrix}0.00000001\\2\end{pmatrix}", r"\begin{pmatrix}0.00000002\\2\end{pmatrix}", 0),
        (r"1.602\times 10^{-19}", r"1.6020\times 10^{-19}", 1),
        (r"\frac{\sqrt2}{10^{20}}", r"\frac{2}{\sqrt2\cdot 10^{20}}", 1),
        (r"\frac{1}{12}", "0.083333", 1),
        (r"\frac{22}{7}", "3.142857", 1),
        ("0", r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}", 1),
        ("0.05", r"5\%", 1),
        (r"\{0.5, 2\}", r"\{2, \frac12\}", 1),
    ]
    return [(f"math, {gold} and {given}", maths(gold), boxed(given), score) for gold, given, score in table]


def rewritten() -> list[tuple]:
    """What the parser would misread or refuse, on either side: gold, answer, score."""
    table = [
        ("10\u00b2", "100", 1),
        ("10\u00b2", "10\u00b2", 1),
        ("x\u00b2+1", "1+x^2", 1),
        ("\u00bd", r"\frac{1}{2}", 1),
        ("\u221a2", r"\sqrt{2}", 1),
        (r"\sqrt{2}", "\u221a2", 1),
        (r"\sqrt{x+1}", "\u221a(x+1)", 1),
        ("60\u00b0", "60", 1),
        (r"60^\circ", "60\u00b0", 1),
        ("\uff11\uff12", "12", 1),
        ("2.0\u00d710\u207b\u00b3", "0.002", 1),
        ("2.5", "2\u00bd", 1),
        ("12000", r"12\,000", 1),
        ("0", r"12\,000", 0),
        ("5", "5.", 1),
        ("5.", "5", 1),
        ("5", r"\mathbf{5}", 1),
        ("5", r"5\text{ million}", 0),
        ("5000000", r"5\text{ million}", 1),
        ("5", "5 dozen", 0),
        (r"(-\infty, 2]", "(-\u221e, 2]", 1),
    ]
    return [(f"math, {given} for {gold}", maths(gold), boxed(given), score) for gold, given, score in table]


def numbers() -> list[tuple]:
    """Signs, scales and words around a number: gold, answer, expected."""
    table = [
        (-5, "The answer is negative 5.", 1),
        (5, "minus 5", 0),
        (-5, "-$5", 1),
        (5, "Answer: -\u20ac5", 0),
        (-1200, "Answer: -\u00a31,200", 1),
        (-5, "$-5", 1),
        (5, "-$-5", "not_a_number"),
        (5, "US$5", 1),
        (5, "--5", "hedged"),
        (-5, "-(5)", "hedged"),
        (5, "\u20145", "hedged"),
        (-5, "\u20125", 1),
        (5e6, "5 million", 1),
        (5, "$5 million", 0),
        (4.35e6, "about 4.35 million", "hedged"),
        (4.35e6, r"\boxed{4.35\text{ million}}", 1),
        (500, "5 hundred", 1),
        (5, "5 hundred thousand", "several_answers"),
        (5, "5e0 million", "not_a_number"),
        (5, "5 dozen", "hedged"),
        (5, "5 and a half", "hedged"),
        (5, "5 pi", "hedged"),
        (5, "5 x", "hedged"),
        (5, "$5 bn", "hedged"),
        (5, "5k", "hedged"),
        (5, "5 squared", "hedged"),
        (5, "sqrt 5", "hedged"),
        (5, "over 5", "hedged"),
        (5, "There are 5 cups above the shelf.", 1),
        (5, "It isn't 5", "hedged"),
        (5, "5\u2030", "hedged"),
        (0.05, "5 percent", 1),
        (5, "5-year", "hedged"),
        (5, "5:5", "several_answers"),
        (5, "one is 5", "several_answers"),
        (5, "half of the 5", "hedged"),
        (5, "5 thirds", "hedged"),
        (5, "In the second quarter, it was 5.", 1),
        (5, "The height is **5**.", 1),
        (5, r"There are \(5\) and only these.", 1),
        (52, "5**2", "several_answers"),
        (5, "$5$.", 1),
        (5, r"\(5\).", 1),
        (5, "The answer is 5.\nAnswer: 5", 1),
        (0.5, r"\boxed{\tfrac12}", 1),
        (1000, "10\u00b3", 1),
        (0.001, r"\boxed{10^{-3}}", 1),
    ]
    return [
        (f"number, {text!r} for {gold:g}", numeric(gold), said(text), wanted) for gold, text, wanted in table
    ]


def measures() -> list[tuple]:
    """Numbers with units: unit, answer, expected for 5."""
    table = [
        ("m", "5 m", 1),
        ("m", "The tower is 5m tall.", 1),
        ("m", "The height is 5.", 1),
        ("m", "5 km", "hedged"),
        ("m", "5 mm", "hedged"),
        ("m", "5 (km)", "hedged"),
        ("m", "5 m/s", "hedged"),
        ("m", "5 m per second", "hedged"),
        ("m", "5 m\u00b2", "several_answers"),
        ("m", "5 million m", 0),
        ("million", "5 million", 1),
        ("cm\u00b2", "\\boxed{5 cm\u00b2}", 1),
        ("cm\u00b2", r"\boxed{5\text{ cm}^2}", 1),
        ("cm^2", "5 cm\u00b2", 1),
        ("cm\u00b2", "5 cm", "hedged"),
        ("\u00b5m", "\\boxed{5 \u00b5m}", 1),
        ("\u00b5m", "5 \u03bcm", 1),
        ("\u2103", "5 \u00b0C", 1),
        (r"^\circ", "\\boxed{5\u00b0}", 1),
        ("in.", "5 in.", 1),
        ("percent", "5%", 1),
    ]
    return [
        (f"number, {text!r} in {unit}", numeric(units=[unit]), said(text), wanted)
        for unit, text, wanted in table
    ]


def counts() -> list[tuple]:
    """What is said of 3 things: answer, expected."""
    table = [
        (r"\boxed{\text{three}}", 1),
        (r"\boxed{\textbf{Three}.}", 1),
        ("There are 3 of them", 1),
        ("two of the 3 cats", "several_answers"),
        ("There are two cats and 3 dogs", "several_answers"),
        ("none of the 3", "hedged"),
        ("all but 3", "hedged"),
        ("3 dozen", "hedged"),
        ("3 hundred", 0),
        ("3 pairs", "hedged"),
        ("3 in each", "hedged"),
        ("another 3", "hedged"),
        ("twenty-3", "several_answers"),
        ("3 and a half", "hedged"),
        ("#3", "hedged"),
    ]
    return [(f"count, {text}", count(), said(text), wanted) for text, wanted in table]
