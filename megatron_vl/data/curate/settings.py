"""Reads the YAML of a curation run strictly, with the rules between its keys; all problems at once."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.config.convert import FAILED, to_dataclass
from megatron_vl.config.sources import read_overrides, read_yaml
from megatron_vl.data.curate.mosaic import missing_fields
from megatron_vl.data.curate.qr import INSTALL
from megatron_vl.data.curate.rules import ConceptBalance, CurationConfig
from megatron_vl.data.curate.state import OUTPUTS
from megatron_vl.errors import Problem, raise_if_any

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def load_curation(path: str, overrides: Sequence[str] = ()) -> CurationConfig:
    """The description of a run from a YAML file and `section.key=value` texts.

    Raises ConfigErrors with every problem: unknown keys, wrong types, values out of range, rules that need
    something that is not there.
    """
    problems: list[Problem] = []
    tree = read_yaml(path, problems)
    _lay_over(tree, read_overrides(overrides, problems))
    raise_if_any(problems)
    config = to_dataclass(CurationConfig, tree, "", problems)
    if config is not FAILED:
        problems += check(config)
    raise_if_any(problems)
    return config


def check(config: CurationConfig) -> Iterator[Problem]:
    """Problems between the keys of a description, and with what it asks for on this machine."""
    yield from _check_sources(config)
    if not os.path.isdir(config.data_root):
        yield Problem(
            "data_root", config.data_root, "is not a folder", "give the folder that holds the images"
        )
    if config.qr_codes.enabled and not _opencv_is_there():
        yield Problem("qr_codes.enabled", True, "needs OpenCV, which is not installed", INSTALL)
    decontamination = config.decontamination
    if decontamination.enabled and not os.path.isdir(decontamination.benchmarks):
        rule = "must be a folder of benchmark files when decontamination is on"
        yield Problem("decontamination.benchmarks", decontamination.benchmarks, rule, "give its path")
    if config.concept_balance.enabled:
        yield from _check_balance(config.concept_balance)
    yield from _check_named_sources(config)
    if config.mosaic.enabled:
        yield from _check_mosaic(config)


def _check_sources(config: CurationConfig) -> Iterator[Problem]:
    if not config.sources:
        yield Problem(
            "sources", [], "must name at least one data set", "add - {name: web, files: [web.jsonl]}"
        )
    for number, source in enumerate(config.sources):
        if not _NAME.fullmatch(source.name):
            rule = "must be letters, digits, '.', '_' and '-', since it names a file"
            yield Problem(f"sources[{number}].name", source.name, rule, "choose another name")
        if not source.files:
            yield Problem(f"sources[{number}].files", [], "must name at least one JSONL file", "add one")
        for file in source.files:
            if not os.path.isfile(file):
                yield Problem(f"sources[{number}].files", file, "is not a file", "correct the path")
            elif _is_output(file, config.output):
                rule = f"lies where this run writes, below {config.output}"
                yield Problem(f"sources[{number}].files", file, rule, "choose another output")
    names = Counter(source.name.lower() for source in config.sources)
    files = Counter(os.path.realpath(file) for source in config.sources for file in source.files)
    for kind, counted in (("name", names), ("files", files)):
        for value in sorted(value for value, count in counted.items() if count > 1):
            yield Problem(
                f"sources.{kind}", value, "is given twice", "every sample would count twice; keep one"
            )


def _check_named_sources(config: CurationConfig) -> Iterator[Problem]:
    known = [source.name for source in config.sources]
    for section, names in (
        ("concept_balance", config.concept_balance.sources),
        ("mosaic", config.mosaic.sources),
    ):
        for name in names:
            if name not in known:
                yield Problem(
                    f"{section}.sources", name, "is not a source", f"the sources are {', '.join(known)}"
                )


def _check_balance(rule: ConceptBalance) -> Iterator[Problem]:
    if (rule.embeddings is None) == (rule.cluster_ids is None):
        yield Problem(
            "concept_balance",
            None,
            "needs either embeddings or cluster_ids",
            "give the path of one .npy file",
            show_value=False,
        )
    if rule.max_per_cluster is None and rule.target_samples is None:
        remedy = "set max_per_cluster, target_samples or both"
        yield Problem("concept_balance", None, "has no limit", remedy, show_value=False)
    for name in ("ids", "embeddings", "cluster_ids"):
        path = getattr(rule, name)
        if path is not None and not os.path.isfile(path):
            yield Problem(f"concept_balance.{name}", path, "is not a file", "correct the path")


def _check_mosaic(config: CurationConfig) -> Iterator[Problem]:
    if not Path(config.output).resolve().is_relative_to(Path(config.data_root).resolve()):
        rule = (
            f"must lie under data_root = {config.data_root}, since the images of mosaics are training images"
        )
        yield Problem("output", config.output, rule, "choose a folder under data_root")
    if missing := missing_fields(config.mosaic.template):
        rule = f"lacks {', '.join('{' + name + '}' for name in missing)}"
        yield Problem("mosaic.template", config.mosaic.template, rule, "name all four quarters")


def _is_output(file: str, output: str) -> bool:
    real, folder = Path(file).resolve(), Path(output).resolve()
    return real.is_relative_to(folder) and real.relative_to(folder).parts[0] in (*OUTPUTS, "state")


def _opencv_is_there() -> bool:
    try:
        return importlib.util.find_spec("cv2") is not None
    except ValueError:  # a module without a specification stands in its place
        return False


def _lay_over(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Puts the values of the command line into the tree of the file, section by section."""
    for name, value in layer.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            _lay_over(tree[name], value)
        else:
            tree[name] = value
