"""Extreme inputs, through the code that a run uses. docs/data.md shows this table; the two are kept equal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.config.mixture import DomainConfig, PackingConfig
from megatron_vl.config.schema import RunConfig, TrainConfig
from megatron_vl.data.loader import Place
from megatron_vl.data.packed import DomainSources, PackedMicroBatches
from megatron_vl.data.rows import RowBuilder
from megatron_vl.data.training import open_domains, plan_ahead, plan_of
from megatron_vl.errors import DataError
from megatron_vl.plan.checks import check_run
from megatron_vl.plan.vision_share import CROP, GLOBAL
from tests.data.sources.making import png, record, tar
from tests.data.tiny import MODEL, build, chat, make_data, write_jsonl

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
CASES: dict[str, tuple[str, Callable[[Path], None]]] = {}


def case(given: str, happens: str):
    """A row of the table."""

    def add(check: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[given] = (happens, check)
        return check

    return add


def run(folder: Path, *domains: DomainConfig, packing: bool = True, **data) -> RunConfig:
    """A run of 4 steps of 8 rows over domains."""
    config = make_data(folder, domains=list(domains), **data)
    if packing:
        rule = PackingConfig(enabled=True, pad_multiple=8, look_ahead_rows=8, index_workers=0)
        config = replace(config, packing=rule)
    train = TrainConfig(train_steps=4, global_batch_size=8)
    return RunConfig(model=MODEL, data=config, train=train, run_dir=str(folder / "run"))


def domain(name: str, path: str, **changes) -> DomainConfig:
    return DomainConfig(**{"name": name, "paths": [path], "weight": 1.0, **changes})


def planned(config: RunConfig) -> tuple[list[str], dict]:
    """What the plan of a run says, and stores."""
    lines: list[str] = []
    Path(config.run_dir).mkdir(exist_ok=True)
    plan_ahead(config, 4, 1, lines.append)
    return lines, json.loads((Path(config.run_dir) / "data_plan.json").read_text())


def chats(folder: Path, count: int = 20, name: str = "a") -> str:
    return write_jsonl(
        folder / f"{name}.jsonl", [chat("What? " + "and " * n, id=f"{name}{n}") for n in range(count)]
    )


@case(
    "an image of 10000x32 pixels",
    "336 crops, legal to the model; refused as `too_many_crops` by the default `data.max_crops: 36`",
)
def thin(folder: Path) -> None:
    Image.new("RGB", (10000, 32)).save(folder / "thin.png")
    data = make_data(folder)
    row, _ = build(RowBuilder(data, MODEL), chat("q", "a", "thin.png"))
    assert data.max_crops == 36 and row.refused.reason == "too_many_crops"
    row, _ = build(
        RowBuilder(replace(data, max_crops=None, seq_length=1 << 14), MODEL), chat("q", "a", "thin.png")
    )
    assert row.view_kinds.count(CROP) == 336 and row.view_kinds.count(GLOBAL) == 1


@case(
    "400 images in one sample",
    "a document like any other; `too_long` where a row cannot hold its tokens, `too_many_views` where "
    "`packing.max_global_views` or `max_crops` forbid it",
)
def many_images(folder: Path) -> None:
    path = write_jsonl(
        folder / "a.jsonl", [chat("q", "a", *["small.png"] * 400), *[chat(id=f"{n}") for n in range(9)]]
    )
    config = run(folder, domain("a", path), seq_length=4096)
    row, images = build(RowBuilder(config.data, MODEL), json.loads(Path(path).read_text().splitlines()[0]))
    assert len(images) == 400 and row.view_kinds == (GLOBAL,) * 400
    assert planned(config)[1]["refused"] == {"a": {}}
    short = replace(config, data=replace(config.data, seq_length=96), run_dir=str(folder / "short"))
    assert planned(short)[1]["refused"] == {"a": {"too_long": 1}}
    packing = replace(config.data.packing, max_global_views=399)
    few = replace(config, data=replace(config.data, packing=packing), run_dir=str(folder / "few"))
    assert planned(few)[1]["refused"] == {"a": {"too_many_views": 1}}


@case("a domain whose files hold no sample", "DataError that names the file, before the run starts")
def no_sample(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"a.jsonl: holds no sample"):
        planned(run(folder, domain("a", str(folder / "a.jsonl"))))


@case(
    "a domain whose samples are all refused",
    "DataError `domain a is empty`, unless its weight is 0; the reasons are in its length index",
)
def all_refused(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", [chat("q", "a", "none.png", id=f"{n}") for n in range(3)])
    config = run(folder, domain("a", path), domain("b", chats(folder, name="b")))
    with pytest.raises(DataError, match="domain a is empty: none of its 3 samples can be trained on"):
        planned(config)
    off = [replace(config.data.domains[0], weight=0.0), config.data.domains[1]]
    assert planned(replace(config, data=replace(config.data, domains=off)))[1]["refused"]["a"] == {
        "missing": 3
    }


@case(
    "a domain smaller than one batch",
    "its documents are repeated within a step, and the plan says `repeats within a step`; DataError where "
    "`max_epochs` is smaller than that",
)
def small_domain(folder: Path) -> None:
    config = run(folder, domain("a", chats(folder, 3)), packing=False)
    lines, stored = planned(config)
    assert "repeats within a step" in "\n".join(lines)
    assert stored["phases"][0]["domains"][0]["documents"] == 32
    limited = replace(config.data, domains=[replace(config.data.domains[0], max_epochs=2)])
    with pytest.raises(DataError, match="repeats domain a .* more than its max_epochs = 2"):
        planned(replace(config, data=limited))


@case("weights that sum to zero", "ConfigError `the weights sum to zero`, before anything is launched")
def no_weight(folder: Path) -> None:
    config = run(folder, domain("a", chats(folder), weight=0.0))
    assert any("the weights sum to zero" in str(problem) for problem in check_run(config))


@case(
    "data that have changed since their length index was made",
    "DataError that names the file, or the first sample that differs; never indexed anew in silence",
)
def older_index(folder: Path) -> None:
    path = chats(folder)
    config = run(folder, domain("a", path))
    planned(config)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole.replace(b'"a19"', b'"b19"'))
    with pytest.raises(
        DataError, match=r"domain a does not belong .* sample 19 \(.*a.jsonl:20\) has changed"
    ):
        planned(config)
    Path(path).write_bytes(whole + b"\n")
    with pytest.raises(DataError, match=r"domain a does not belong .*\.bytes was \d+, is \d+"):
        planned(config)
    Path(path).write_bytes(whole)
    assert planned(config)


@case(
    "a copy of the data in another place, or with other times",
    "the same data: its records are compared once with the checksums of the length index",
)
def copied(folder: Path) -> None:
    path = chats(folder)
    config = run(folder, domain("a", path))
    digest = planned(config)[1]["digest"]
    shutil.copy(path, folder / "copy.jsonl")
    os.utime(folder / "copy.jsonl", ns=(1, 1))
    domains = [domain("a", str(folder / "copy.jsonl"))]
    lines, stored = planned(replace(config, data=replace(config.data, domains=domains)))
    assert stored["digest"] == digest and any("comparing its contents" in line for line in lines)


@case(
    "a sample that changed behind an unchanged size and time",
    "DataError that names it when it is trained on: each is compared with its checksum as it is loaded",
)
def edited_in_secret(folder: Path) -> None:
    path = chats(folder, 4)
    config = run(folder, domain("a", path))
    planned(config)
    times = os.stat(path)
    Path(path).write_bytes(Path(path).read_bytes().replace(b'"red"', b'"rad"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    sources = open_domains(config, lambda line: None)
    plan = plan_of(config, sources, 4, False, lambda line: None)
    batches = PackedMicroBatches(DomainSources(sources), plan, RowBuilder(config.data, MODEL), Place())
    with pytest.raises(DataError, match=r"sample a\d \(.*a.jsonl:\d\) of domain a is not what it was"):
        batches[0]


@case(
    "a tar with a broken member",
    "the sample of that member is refused (`bad_header`, `truncated_member`), counted and listed; the others stay",
)
def broken_tar(folder: Path) -> None:
    members = [
        (f"{n}.{end}", data) for n in range(12) for end, data in (("json", record("png")), ("png", png(n)))
    ]
    path = Path(tar(folder / "a.tar", members))
    whole = bytearray(path.read_bytes())
    broken = bytes(whole).index(b"3.png") + 148  # the header's checksum
    whole[broken : broken + 6] = b"999999"
    end = bytes(whole).index(b"11.png") + 512 + 20
    path.write_bytes(bytes(whole[:end]))
    config = run(folder, domain("a", str(path)))
    (source,) = open_domains(config, lambda line: None)
    assert source.refused_counts() == {"bad_header": 1, "truncated_member": 1} and len(source) == 10
    assert [bad.id for bad in source.refused()] == ["a.tar:3", "a.tar:11"]
    assert planned(config)[1]["refused"] == {"a": {}}


@case(
    "a page whose images are partly missing",
    "it goes without them, and the plan counts them; with more than 90% of its images gone it is refused as "
    "`failed_images`",
)
def page(folder: Path) -> None:
    (folder / "site").mkdir()
    for number in range(5):
        (folder / "site" / f"{number}.html").write_text(
            f"<p>text {number}<img src=../wide.png><img src=none.png>"
        )
    (folder / "site" / "bad.html").write_text("<p>text<img src=none.png>")
    lines, stored = planned(run(folder, domain("a", str(folder / "site"))))
    assert stored["left_out"] == {"a": {"missing": 5}} and stored["refused"] == {"a": {"failed_images": 1}}
    assert "  images that pages of domain a go without: missing 5" in "\n".join(lines)


@case(
    "two runs that build one `packing.index_dir` at a time",
    "one builds, the others say whom they wait for and use what it made; a builder that gives no sign of life for 60 s "
    "is succeeded",
)
def shared(folder: Path) -> None:
    """With real processes: test_lengths.test_two_processes_build_one_index; here the second run finds the first's."""
    config = run(folder, domain("a", chats(folder)))
    packing = replace(config.data.packing, index_dir=str(folder / "shared"))
    first = replace(config, data=replace(config.data, packing=packing))
    second = replace(first, run_dir=str(folder / "second"))
    digest = planned(first)[1]["digest"]
    lines, stored = planned(second)
    assert stored["digest"] == digest and not any("samples," in line and "second," in line for line in lines)


@pytest.mark.parametrize("given", CASES)
def test_it_happens(given: str, tmp_path: Path):
    CASES[given][1](tmp_path)


def test_the_table_of_the_docs_is_this_one():
    text = DOCS.read_text().partition("## Extreme inputs")[2].partition("## Reasons")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [tuple(row) for row in rows] == [(given, happens) for given, (happens, _) in CASES.items()]
