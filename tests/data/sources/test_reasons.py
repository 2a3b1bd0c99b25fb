"""Every code that a source can give stands in the table and in docs/data.md, and nothing else does."""

import ast
import re
from pathlib import Path

from megatron_vl.data.image_checks import REASONS as OF_IMAGES
from megatron_vl.data.sources.reasons import REASONS

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "megatron_vl" / "data" / "sources"
OF_SAMPLES = {
    "not_utf8", "broken_json", "not_an_object", "bad_id", "missing_messages", "bad_message", "unknown_role",
    "empty_message", "unknown_part", "bad_part", "bad_text", "image_in_assistant", "image_count",
}  # fmt: skip


def codes_in_source() -> set[str]:
    """Strings that could be codes, in every file but the table."""
    found: set[str] = set()
    for path in FOLDER.glob("*.py"):
        if path.name != "reasons.py":
            tree = ast.parse(path.read_text())
            found |= {
                n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
    return found


def codes_given() -> set[str]:
    """First arguments of the refusals that are spelled out, and what `_refuse` and `Refusal` are given."""
    found: set[str] = set()
    position = {"SampleRefused": 0, "ImageRefused": 0, "Refusal": 2, "_refuse": 2, "_decoded": 2}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                place = position.get(name)
                if place is not None and len(node.args) > place:
                    arguments = ast.walk(node.args[place])
                    found |= {
                        n.value for n in arguments if isinstance(n, ast.Constant) and isinstance(n.value, str)
                    }
    return found - {"utf-8"}


def test_every_code_that_is_given_is_in_a_table():
    assert codes_given() - set(REASONS) - set(OF_IMAGES) - OF_SAMPLES == set()
    assert len(codes_given() & set(REASONS)) > 25


def test_every_code_of_the_table_is_given():
    assert set(REASONS) - codes_in_source() == set()


def test_the_document_shows_the_table():
    text = (ROOT / "docs" / "data.md").read_text().split("## Reasons\n")[1]
    rows = dict(re.findall(r"^\| `([a-z0-9_]+)` \| (.+?) \|$", text, re.MULTILINE))
    assert rows == REASONS
