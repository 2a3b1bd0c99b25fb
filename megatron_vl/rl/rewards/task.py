"""What is asked of a response, read strictly from the record of a prompt.

    {"kind": "math", "answer": "\\\\frac{1}{2}"}
    {"kind": "choice", "answer": "B", "choices": ["red", "green", "blue"]}
    {"kind": "box", "answer": [[12, 30, 200, 180]], "image_size": [640, 480], "coordinates": "pixel"}

`KEYS` names the keys of each kind; docs/rewards.md says what they mean. A key that the kind does not read is refused:
it would look as if it acted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_vl.errors import DataError
from megatron_vl.rl.rewards.extract import MAX_ANSWER, normalise
from megatron_vl.rl.rewards.geometry import CONVENTIONS, MAX_SHAPES, Canvas, Decay
from megatron_vl.rl.rewards.grounding import polygon_corners, valid_polygon
from megatron_vl.rl.rewards.gui import ACTIONS, TYPES, check_action, is_number
from megatron_vl.rl.rewards.mathematics import latex
from megatron_vl.rl.rewards.verdict import NotAnAnswer

_EVERY = ("kind", "thinking", "check_process", "question")
_PLACE = ("answer", "image_size", "coordinates", "clip", "floor", "power")
KEYS: Mapping[str, tuple[str, ...]] = {
    "exact": ("answer", "boxed", "case_sensitive"),
    "choice": ("answer", "boxed", "choices"),
    "math": ("answer",),
    "numeric": ("answer", "boxed", "abs_tolerance", "rel_tolerance", "units"),
    "count": ("answer", "boxed"),
    "box": _PLACE,
    "point": (*_PLACE, "radius"),
    "polygon": _PLACE,
    "gui": ("answer", "actions", "image_size", "coordinates", "clip", "floor", "power", "radius"),
    "judge": ("answer", "boxed"),
    "format": ("boxed",),
}
MAX_SIDE = 1_000_000  # pixels of an image
GROUNDED = ("box", "point", "polygon", "gui")


@dataclass(frozen=True)
class Task:
    """What a verifier needs to know of one prompt; made by `parse_task`, which checks it.

    answer: exact: tuple of accepted texts. choice: tuple of letters, sorted. math, judge: text. numeric: float. count:
    int. box: tuple of (x1, y1, x2, y2), point: tuple of (x, y), polygon: tuple of corners, all in `coordinates`. gui:
    the action as JSON text. format: None.
    """

    kind: str
    answer: object = None
    thinking: bool = True
    boxed: bool = False
    check_process: bool = False
    question: str = ""
    case_sensitive: bool = False
    choices: tuple[str, ...] = ()
    abs_tolerance: float = 0.0
    rel_tolerance: float = 1e-9
    units: tuple[str, ...] = ()
    image_size: tuple[int, int] = (1, 1)
    coordinates: str = "0-1000"
    clip: bool = False
    floor: float = 0.0
    power: float = 1.0
    radius: float = 0.1
    actions: str = ""  # JSON text, so that a task can be compared and hashed; empty: `gui.ACTIONS`

    @property
    def canvas(self) -> Canvas:
        return Canvas(*self.image_size, self.coordinates, self.clip)

    @property
    def decay(self) -> Decay:
        return Decay(self.floor, self.power)

    @property
    def action_schema(self) -> Mapping[str, Mapping[str, object]]:
        return json.loads(self.actions) if self.actions else ACTIONS

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that tell tasks apart; stored with every reward."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_task(record: object, where: str = "task") -> Task:
    """The task of a record. where: begins the message of errors. Raises DataError with key, value, rule and remedy."""
    return _Reader(record, where).task()


class _Reader:
    """Reads one record; every method checks one form of value."""

    def __init__(self, record: object, where: str):
        if not isinstance(record, dict):
            raise DataError(f"{where} is {_shown(record)}; it must be an object with kind and answer")
        self.record, self.where = record, where
        self.kind = record.get("kind")
        if not isinstance(self.kind, str) or self.kind not in KEYS:
            raise self.error("kind", f"must be one of {', '.join(KEYS)}")

    def task(self) -> Task:
        keys = (*_EVERY, *KEYS[self.kind])
        for key in self.record:
            if key not in keys:
                raise self.error(
                    key, f"is not read for kind {self.kind}; leave it out (read: {', '.join(keys)})"
                )
        readers: dict[str, Callable[[str], object]] = {
            **dict.fromkeys(("thinking", "boxed", "check_process", "case_sensitive", "clip"), self.flag),
            **dict.fromkeys(("abs_tolerance", "rel_tolerance"), self.number),
            "choices": self.texts,
            "units": lambda key: tuple(map(normalise, self.texts(key))),
            "kind": self.text,
            "question": self.text,
            "coordinates": self.convention,
            "image_size": self.size,
            "floor": lambda key: self.number(key, below=1.0),
            "power": lambda key: self.number(key, above=0.0),
            "radius": lambda key: self.number(key, above=0.0),
            "actions": self.schema,
        }
        values = {key: readers[key](key) for key in self.record if key != "answer"}
        for key in ("image_size", "coordinates") if self.kind in GROUNDED else ():
            if key not in values:
                raise self.error(key, f"is needed for kind {self.kind}")
        task = Task(**values)
        if task.check_process and not task.question:
            raise self.error(
                "question", "is needed where check_process is true, for the judge to follow the reasoning"
            )
        if self.kind == "format":
            return task
        if "answer" not in self.record:
            raise self.error("answer", f"is needed for kind {self.kind}")
        try:
            return dataclasses.replace(task, answer=self.gold(task))
        except NotAnAnswer as error:
            raise self.error("answer", f"cannot be right: {error}") from error

    def gold(self, task: Task) -> object:
        value = self.record["answer"]
        if self.kind == "exact":
            return self.texts("answer") if isinstance(value, list) else (self.text("answer"),)
        if self.kind == "choice":
            return self.letters(task)
        if self.kind == "judge":
            return self.text("answer")
        if self.kind == "math":
            return latex(self.text("answer"))
        if self.kind == "numeric":
            return self.number("answer", least=-math.inf)
        if self.kind == "count":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.error("answer", "must be a whole number from 0")
            return value
        if self.kind == "gui":
            return self.action(task)
        return self.places(task)

    def places(self, task: Task) -> tuple[tuple[float, ...], ...]:
        length = 4 if self.kind == "box" else 2
        value = self.record["answer"]
        shapes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        if len(shapes) > MAX_SHAPES:
            raise self.error("answer", f"has more than {MAX_SHAPES} places")
        if not all(
            isinstance(shape, list) and len(shape) == length and all(map(is_number, shape))
            for shape in shapes
        ):
            raise self.error("answer", f"must be lists of {length} finite numbers")
        places = tuple(tuple(map(float, shape)) for shape in shapes)
        if self.kind == "box":
            [task.canvas.box(place) for place in places]
        elif self.kind == "point":
            [task.canvas.point(*place) for place in places]
        else:
            valid_polygon(polygon_corners(places, task.canvas))
        return places

    def action(self, task: Task) -> str:
        value, schema = self.record["answer"], task.action_schema
        boxed_points = isinstance(value, dict) and {
            key: [0, 0]
            for key, place in value.items()
            if isinstance(place, list) and len(place) == 4 and all(map(is_number, place))
        }
        check_action({**value, **boxed_points} if isinstance(value, dict) else value, schema)
        for key, kind in schema[value["action"]].items():
            if kind == "point":
                place = value[key]
                task.canvas.box(place) if len(place) == 4 else task.canvas.point(*place)
        return json.dumps(value, sort_keys=True)

    def letters(self, task: Task) -> tuple[str, ...]:
        if len(task.choices) not in range(2, 27):
            raise self.error("choices", "must be 2 to 26 texts, one for each option in order")
        allowed = [chr(ord("A") + number) for number in range(len(task.choices))]
        letters = self.texts("answer") if isinstance(self.record["answer"], list) else (self.text("answer"),)
        if len(set(letters)) != len(letters) or not set(letters) <= set(allowed):
            raise self.error("answer", f"must be letters of {', '.join(allowed)}, each once")
        return tuple(sorted(letters))

    def schema(self, key: str) -> str:
        value = self.record[key]
        fine = isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values())
        kinds = [kind for one in value.values() for kind in one.values()] if fine else []
        for kind in kinds:
            named = isinstance(kind, list) and kind and all(isinstance(one, str) for one in kind)
            fine = fine and (named or (isinstance(kind, str) and kind in TYPES))
        if not fine or any("action" in one for one in value.values()):
            raise self.error(
                key, f"must map actions to parameters and these to {', '.join(TYPES)} or a list of texts"
            )
        return json.dumps(value, sort_keys=True)

    def size(self, key: str) -> tuple[int, int]:
        value = self.record[key]
        whole = isinstance(value, list) and all(type(side) is int and 0 < side <= MAX_SIDE for side in value)
        if not whole or len(value) != 2:
            raise self.error(key, f"must be [width, height] in pixels, at most {MAX_SIDE} each")
        return tuple(value)

    def convention(self, key: str) -> str:
        if self.record[key] not in CONVENTIONS:
            raise self.error(key, f"must be one of {', '.join(CONVENTIONS)}")
        return self.record[key]

    def flag(self, key: str) -> bool:
        if not isinstance(self.record[key], bool):
            raise self.error(key, "must be true or false")
        return self.record[key]

    def text(self, key: str) -> str:
        return self._text(key, self.record[key])

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.record[key]
        if not isinstance(value, list) or not value:
            raise self.error(key, "must be a list of texts")
        return tuple(self._text(key, item) for item in value)

    def _text(self, key: str, value: object) -> str:
        limit = math.inf if key == "question" else MAX_ANSWER
        if not isinstance(value, str) or not value.strip() or len(value) > limit:
            raise self.error(key, f"must be text, not empty and of at most {limit} characters")
        return value

    def number(
        self, key: str, least: float = 0.0, above: float = -math.inf, below: float = math.inf
    ) -> float:
        value = self.record[key]
        if not is_number(value) or not least <= value < below or value <= above:
            bounds = (
                "" if least == -math.inf else f" from {least:g}" if above < least else f" above {above:g}"
            )
            bounds += f" and below {below:g}" if below < math.inf else ""
            raise self.error(key, f"must be a finite number{bounds}")
        return float(value)

    def error(self, key: str, rule: str) -> DataError:
        given = f"= {_shown(self.record[key])}" if key in self.record else "is missing"
        return DataError(f"{self.where}.{key} {given}: it {rule}")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
