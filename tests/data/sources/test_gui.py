"""GUI trajectories: actions checked against the schema, written into the text, refused with the right code."""

import json

import pytest

from megatron_vl.data.sources.gui import DEFAULT_SCHEMA, GuiLine, load_schema
from megatron_vl.data.sources.open import open_source
from megatron_vl.data.sources.survey import survey
from megatron_vl.errors import ConfigError, DataError
from tests.data.sources.making import jsonl, quiet, reason_of

SCHEMA = load_schema(DEFAULT_SCHEMA)


def trajectory(*turns: dict) -> GuiLine:
    messages = []
    for number, turn in enumerate(turns):
        shot = [{"type": "image", "image": f"s{number}.png"}, {"type": "text", "text": "next"}]
        messages += [{"role": "user", "content": shot}, {"role": "assistant", **turn}]
    return GuiLine("g.jsonl", 1, json.dumps({"id": "t", "messages": messages}).encode(), SCHEMA)


def test_the_default_schema_has_twelve_actions_and_says_whose_they_are():
    assert len(SCHEMA.actions) == 12 and {"CLICK", "SLIDE", "TYPE", "SCROLL"} <= set(SCHEMA.actions)
    assert "this library's choice" in json.loads(DEFAULT_SCHEMA.read_text())["note"]


def test_actions_are_written_into_the_turns():
    sample = trajectory(
        {"content": "Top right.", "action": {"name": "CLICK", "point": [500, 82.5]}},
        {"actions": [{"action": "TYPE", "point": [1, 2], "text": "grüß"}, {"name": "BACK"}]},
        {"content": 'Done.\n{"action": "FINISH", "status": "success"}  '},
    ).parse()
    assert [m.parts[0].text for m in sample.messages if m.role == "assistant"] == [
        'Top right.\n{"action": "CLICK", "point": [500, 82.5]}',
        '{"action": "TYPE", "text": "grüß", "point": [1, 2]}\n{"action": "BACK"}',
        'Done.\n{"action": "FINISH", "status": "success"}  ',
    ]
    assert [image.path for image in sample.images] == ["s0.png", "s1.png", "s2.png"]


def test_sharegpt_turns_act_too():
    turns = [
        {"from": "human", "value": "<image>go"},
        {"from": "gpt", "value": "", "action": {"name": "CLICK", "point": [0, 1000]}},
    ]
    record = {"conversations": turns, "images": ["a.png"], "system": "You act."}
    sample = GuiLine("g.jsonl", 1, json.dumps(record).encode(), SCHEMA).parse()
    assert sample.messages[2].parts[0].text == '{"action": "CLICK", "point": [0, 1000]}'


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"action": {"name": "FLY"}}, "unknown_action"),
        ({"action": {"name": "click", "point": [1, 1]}}, "unknown_action"),
        ({"action": {"name": "CLICK", "point": [1, 1], "force": 3}}, "unknown_parameter"),
        ({"action": {"name": "CLICK"}}, "missing_parameter"),
        ({"action": {"name": "CLICK", "point": [1001, 1]}}, "bad_parameter"),
        ({"action": {"name": "CLICK", "point": [-1, 1]}}, "bad_parameter"),
        ({"action": {"name": "CLICK", "point": [1]}}, "bad_parameter"),
        ({"action": {"name": "CLICK", "point": [True, 1]}}, "bad_parameter"),
        ({"action": {"name": "CLICK", "point": [float("nan"), 1]}}, "bad_parameter"),
        ({"action": {"name": "TYPE", "text": 5}}, "bad_parameter"),
        ({"action": {"name": "TYPE", "text": "x" * 4001}}, "bad_parameter"),
        ({"action": {"name": "SCROLL", "direction": "sideways"}}, "bad_parameter"),
        ({"action": {"name": "WAIT", "seconds": "3"}}, "bad_parameter"),
        ({"action": {"name": "WAIT", "seconds": None}}, "bad_parameter"),
        ({"action": "CLICK"}, "bad_action"),
        ({"action": {"name": 3}}, "bad_action"),
        ({"actions": []}, "bad_action"),
        ({"actions": {"name": "BACK"}}, "bad_action"),
        ({"action": {"name": "BACK"}, "actions": [{"name": "BACK"}]}, "two_forms"),
        ({"content": "I think."}, "missing_action"),
        ({"content": ""}, "missing_action"),
        ({"content": 'x\n{"action": "CLICK", "point": [1,'}, "bad_action"),
        ({"content": '{"point": [1, 1]}'}, "bad_action"),
        ({"content": '{"action": "FLY"}'}, "unknown_action"),
        ({"content": ["x"], "action": {"name": "BACK"}}, "bad_message"),
    ],
)
def test_bad_actions(turn, reason):
    assert reason_of(trajectory({"action": {"name": "HOME"}}, turn)) == reason
    assert reason_of(trajectory({"action": {"name": "HOME"}})) == ""


def test_a_user_does_not_act():
    record = {"messages": [{"role": "user", "content": "x", "action": {"name": "BACK"}}]}
    assert reason_of(GuiLine("g.jsonl", 1, json.dumps(record).encode(), SCHEMA)) == "bad_action"


def test_refusals_are_counted(tmp_path):
    records = [
        trajectory(turn).data for turn in ({"action": {"name": "BACK"}}, {"action": {"name": "FLY"}}, {})
    ]
    source = open_source(
        jsonl(tmp_path / "g.jsonl", records), "gui", action_schema=str(DEFAULT_SCHEMA), say=quiet
    )
    found = survey(source)
    assert found.kept == 1 and found.refused == {"unknown_action": 1, "missing_action": 1}
    with pytest.raises(ConfigError, match="format = gui needs action_schema"):
        open_source(str(tmp_path / "g.jsonl"), "gui", say=quiet)


def test_types_of_parameters(tmp_path):
    schema = {
        "coordinate_convention": "0-1",
        "action_required": False,
        "actions": {
            "A": {
                "b": {"type": "box"},
                "i": {"type": "integer", "min": 1, "max": 3},
                "f": {"type": "boolean", "optional": True},
                "n": {"type": "number", "optional": True},
            }
        },
    }
    (tmp_path / "s.json").write_text(json.dumps(schema))
    loaded = load_schema(tmp_path / "s.json")
    good = {"action": "A", "b": [0, 0.5, 1, 1.0], "i": 2}
    assert loaded.check(good, "x") == good and loaded.check({**good, "f": False}, "x")["f"] is False
    for change in (
        {"b": [0.5, 0, 0.4, 1]},
        {"b": [0, 0, 1, 1.1]},
        {"i": 4},
        {"i": 2.0},
        {"i": True},
        {"f": 0},
        {"n": float("inf")},
        {"n": float("nan")},
    ):
        with pytest.raises(DataError, match="bad_parameter"):
            loaded.check({**good, **change}, "x")
    line = GuiLine("g", 1, b'{"messages": [{"role": "assistant", "content": "no action"}]}', loaded)
    assert reason_of(line) == ""


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not a readable action schema"),
        ({"actions": {}}, "an action schema is an object with actions"),
        ({"actions": {"A": {}}, "extra": 1}, "an action schema is an object with actions"),
        ({"actions": {"A": {}}}, "coordinate_convention = null: must be one of pixel"),
        ({"actions": {"A": []}, "coordinate_convention": "pixel"}, "actions.A must be an object"),
        ({"actions": {"A": {"p": {"type": "color"}}}, "coordinate_convention": "pixel"}, "actions.A.p is"),
        (
            {"actions": {"A": {"p": {"type": "point", "max": 3}}}, "coordinate_convention": "pixel"},
            "max is no limit of a point",
        ),
        (
            {
                "actions": {"A": {"p": {"type": "number", "min": 3, "max": 1}}},
                "coordinate_convention": "pixel",
            },
            "from 3 to 1 leaves nothing",
        ),
    ],
)
def test_bad_schemas(tmp_path, schema, message):
    path = tmp_path / "s.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema))
    with pytest.raises(DataError, match=message):
        load_schema(path)
