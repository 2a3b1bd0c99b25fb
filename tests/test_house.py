"""The rules of the house: import direction, process groups, file sizes, no key that nobody reads.

All of it is read from the source by AST; nothing of the package is run, except that the schema is imported.
"""

import ast
import dataclasses
import statistics
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_vl"
MAX_LINES, MAX_MEDIAN = 500, 220

# What each folder may import from the package, besides itself. `errors` is open to all.
ALLOWED = {
    "config": set(),
    "plan": {"config"},
    "parallel": {"config", "plan"},
    "ops": {"config", "plan", "parallel"},
    "model": {"config", "plan", "parallel", "ops"},
    "data": {"config", "plan"},
    "optim": {"config", "plan", "parallel"},
    "checkpoint": {"config", "plan", "parallel", "ops", "model", "optim"},
}
ALLOWED["train"] = {"data", "checkpoint", *ALLOWED["checkpoint"]}
ALLOWED["parity"] = {"train", *ALLOWED["train"]}
ALLOWED["bench"] = {"train", *ALLOWED["train"]}
ALLOWED["generate"] = {"train", *ALLOWED["train"]}
ALLOWED["rl"] = {"generate", *ALLOWED["generate"]}
ALLOWED["evaluate"] = {"rl", *ALLOWED["rl"]}
OPEN_TO_ALL = {"", "errors"}  # "": the package itself, for its version

# Ways of making a process group, or of reading the state that one process has only once.
GROUP_MAKERS = {
    "init_process_group",
    "destroy_process_group",
    "new_group",
    "new_subgroups",
    "init_device_mesh",
    "initialize_model_parallel",
    "destroy_model_parallel",
}
GLOBAL_READERS = {"get_rank", "get_world_size", "get_backend", "get_default_backend", "is_initialized"}
TORCH_FREE = ("config", "plan")


def python_files(*folders: Path) -> list[Path]:
    """Python sources below the folders, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


FILES = python_files(PACKAGE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """The folder of the package that a file belongs to; the name of the file itself at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, anywhere in the file. `from a import b` gives `a.b` too."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_imports(path: Path) -> list[str]:
    """Imports that go against the direction of the house."""
    room, wrong = room_of(path), set()
    if room not in ALLOWED:  # files at the top: errors, the dispatcher
        allowed = set(ALLOWED) if room == "__main__" else set()
    else:
        allowed = ALLOWED[room] | {room}
    for line, module in imported_modules(path):
        root, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if root in ("tools", "examples", "tests"):
            wrong.add(f"{name_of(path)}:{line}: the package does not import {root}/")
        if root == "megatron_vl" and target in ALLOWED and target not in allowed:
            wrong.add(f"{name_of(path)}:{line}: {room}/ may not import {target}/")
        if room in TORCH_FREE and root in ("torch", "megatron", "numpy", "transformer_engine"):
            wrong.add(f"{name_of(path)}:{line}: {room}/ is free of {root}")
    return sorted(wrong)


def own_groups(path: Path) -> list[str]:
    """Process groups made, or torch.distributed globals read, outside parallel/."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        handed_a_group = bool(node.args) or any(keyword.arg == "group" for keyword in node.keywords)
        from_globals = owner.rpartition(".")[2] in ("dist", "distributed")
        if called in GROUP_MAKERS:
            found.append(f"{name_of(path)}:{node.lineno}: {called} belongs to parallel/")
        elif called in GLOBAL_READERS and from_globals and not handed_a_group:
            found.append(f"{name_of(path)}:{node.lineno}: {called}() without a group belongs to parallel/")
        elif owner.rpartition(".")[2] in ("parallel_state", "mpu"):
            found.append(f"{name_of(path)}:{node.lineno}: {owner} is read by parallel/ only")
    return found


def config_keys() -> dict[str, str]:
    """`Class.key` -> key, over all dataclasses of the configuration that hold values."""
    from megatron_vl.config.schema import RunConfig

    def walk(cls: type) -> Iterator[tuple[str, str]]:
        for name, hint in typing.get_type_hints(cls).items():
            parts = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
            for part in parts:
                yield from walk(part)
            if not parts:
                yield f"{cls.__name__}.{name}", name

    return dict(walk(RunConfig))


def attributes_read(path: Path) -> set[str]:
    """Names that the file reads as `something.name`, or by getattr; method calls do not count."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {id(call.func) for call in calls}
    names = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
    }
    for call in calls:
        if getattr(call.func, "id", "") == "getattr":
            names |= {str(name.value) for name in call.args[1:2] if isinstance(name, ast.Constant)}
    return names


def own_words(path: Path) -> set[str]:
    """Attribute names that a file of config/ reads on `self`: derived properties, which count as readers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_up_the_list_only(path):
    assert wrong_imports(path) == []


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) != "parallel"], ids=name_of)
def test_only_parallel_makes_groups_and_reads_globals(path):
    assert own_groups(path) == []


def test_every_folder_of_the_package_has_a_place():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms <= set(ALLOWED)


def test_file_sizes():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert (
        statistics.median(count for name, count in lines.items() if not name.endswith("__init__.py"))
        <= MAX_MEDIAN
    )


def test_every_key_is_read():
    readers = [path for path in python_files(PACKAGE, ROOT / "tools") if room_of_reader(path) != "config"]
    read = set().union(*map(attributes_read, readers))
    read |= set().union(*(own_words(path) for path in FILES if room_of(path) == "config"))
    assert sorted(path for path, name in config_keys().items() if name not in read) == []


def room_of_reader(path: Path) -> str:
    return room_of(path) if path.is_relative_to(PACKAGE) else "tools"


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("config", "from megatron_vl.plan import layout", "config/ may not import plan/"),
        ("plan", "def f():\n    import torch.nn", "plan/ is free of torch"),
        ("data", "from ..model import fusion", "data/ may not import model/"),
        ("model", "import tools.check_parity", "the package does not import tools/"),
        ("train", "from megatron_vl.rl.ppo import step", "train/ may not import rl/"),
        ("plan", "from megatron_vl.errors import Problem\nfrom megatron_vl.config import key", None),
    ],
)
def test_the_import_rule_can_fail(tmp_path, monkeypatch, room, source, expected):
    path = planted(tmp_path, monkeypatch, room, source)
    found = wrong_imports(path)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_the_rule_about_keys_can_fail(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text("config.data.seed\nmodel.train()\nconfig.data.eval = 1\ngetattr(config, 'run_dir')\n")
    assert attributes_read(path) == {"data", "seed", "run_dir"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist\ndist.new_group([0])", "new_group belongs to parallel/"),
        ("import torch.distributed as dist\ndist.get_rank()", "get_rank() without a group"),
        ("import torch\ntorch.distributed.get_world_size()", "get_world_size() without a group"),
        ("from megatron.core import parallel_state\nparallel_state.get_x()", "parallel_state is read by"),
        ("import torch.distributed as dist\ndist.get_rank(group)", None),
        ("coords = layout.get_rank()", None),
    ],
)
def test_the_group_rule_can_fail(tmp_path, monkeypatch, source, expected):
    found = own_groups(planted(tmp_path, monkeypatch, "model", source))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, source: str) -> Path:
    """A file of a package of the same name in a temporary folder, which the rules are made to look at."""
    monkeypatch.setattr("tests.test_house.ROOT", tmp_path, raising=True)
    monkeypatch.setattr("tests.test_house.PACKAGE", tmp_path / "megatron_vl", raising=True)
    path = tmp_path / "megatron_vl" / room / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return path
