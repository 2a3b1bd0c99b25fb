"""The YAML of a run: strict, all problems at once, with remedies."""

import pytest

from megatron_vl.data.curate.settings import load_curation
from megatron_vl.errors import ConfigErrors


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Relative paths are looked up here."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)


def load(tmp_path, yaml: str, *overrides: str):
    path = tmp_path / "c.yaml"
    path.write_text(yaml)
    return load_curation(str(path), overrides)


def problems(tmp_path, yaml: str, *overrides: str) -> str:
    with pytest.raises(ConfigErrors) as error:
        load(tmp_path, yaml, *overrides)
    return str(error.value)


GOOD = "output: out\nsources:\n  - {name: web, files: [a.jsonl]}\n"


def test_defaults_are_those_of_the_report(tmp_path):
    config = load(tmp_path, GOOD)
    assert config.failed_images.max_ratio == 0.9 and config.decontamination.ngram == 64
    assert not config.qr_codes.enabled and config.degenerate_text.enabled


def test_the_command_line_wins(tmp_path):
    config = load(
        tmp_path, GOOD + "near_duplicates: {radius: 2}\n", "near_duplicates.enabled=true", "chunk_samples=9"
    )
    assert config.near_duplicates.enabled and config.near_duplicates.radius == 2 and config.chunk_samples == 9


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("qr_code: {enabled: true}", "did you mean qr_codes?"),
        ("near_duplicates: {radiuss: 2}", "did you mean near_duplicates.radius?"),
        ("failed_images: {max_ratio: 90}", "must be at most 1"),
        ("near_duplicates: {radius: 2.5}", "must be a whole number"),
        ("mosaic: {enabled: yes please}", "must be true or false"),
        ("grounding: {coordinate_convention: 0-100}", "must be one of pixel, 0-1, 0-1000"),
        ("decontamination: {enabled: true}", "must be a folder of benchmark files"),
        ("concept_balance: {enabled: true, ids: none.txt}", "needs either embeddings or cluster_ids"),
        ("concept_balance: {enabled: true, ids: none.txt}", "has no limit"),
        ("mosaic: {enabled: true, sources: [other]}", "is not a source"),
        ("mosaic: {enabled: true, template: 'x {top_left}'}", "lacks {top_right}"),
        ("mosaic: {enabled: true}\ndata_root: /usr", "must lie under data_root"),
        ("sources: []", "given twice"),
        ("data_root: no/such/folder", "is not a folder"),
        ("output: again", "given twice"),
        ("x: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_problems_are_named(tmp_path, extra, message):
    assert message in problems(tmp_path, GOOD + extra + "\n")


def test_sources_are_checked(tmp_path):
    text = problems(
        tmp_path,
        "output: o\nsources:\n- {name: ../a, files: [x]}\n- {name: b, files: [./x]}\n- {name: B, files: []}\n",
    )
    for part in (
        "../a",
        "sources[1].files = ./x: is not a file",
        "sources.name = b: is given twice",
        "sources.files",
        "sources[2].files",
    ):
        assert part in text
    assert "sources: is required" in problems(tmp_path, "chunk_samples: 1\n")


def test_data_do_not_lie_where_the_run_writes(tmp_path):
    (tmp_path / "out" / "kept").mkdir(parents=True)
    (tmp_path / "out" / "kept" / "b.jsonl").write_text("{}\n")
    (tmp_path / "out" / "b.jsonl").write_text("{}\n")
    assert load(tmp_path, GOOD.replace("a.jsonl", "out/b.jsonl")).sources[0].files == ["out/b.jsonl"]
    assert "lies where this run writes" in problems(tmp_path, GOOD.replace("a.jsonl", "out/kept/b.jsonl"))


def test_all_problems_come_at_once(tmp_path):
    assert problems(tmp_path, GOOD + "a: 1\nb: 2\nfailed_images: {max_ratio: -1}\n").startswith("3 problems")
