"""Records of tasks and responses, as the tables of verdicts write them."""

from __future__ import annotations

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
