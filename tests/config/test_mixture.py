"""Mixture and packing as sections of a YAML file."""

from dataclasses import dataclass

import yaml

from megatron_vl.config.convert import to_dataclass
from megatron_vl.config.dump import to_mapping
from megatron_vl.config.key import key
from megatron_vl.config.mixture import DomainConfig, DomainShare, MixturePhase, PackingConfig


@dataclass(frozen=True)
class Section:
    """As the data section holds them."""

    domains: list[DomainConfig] = key("domains", factory=list)
    mixture: list[MixturePhase] = key("phases", factory=list)
    packing: PackingConfig = key("packing", factory=PackingConfig)


def load(text: str) -> tuple[Section, list[str]]:
    problems = []
    section = to_dataclass(Section, yaml.safe_load(text), "data", problems)
    return section, [str(problem) for problem in problems]


def test_two_stages():
    section, problems = load(
        """
        domains:
          - {name: text, paths: [t.jsonl], modality: text, weight: 2}
          - {name: vqa, paths: [v.jsonl], weight: 1, max_epochs: 4}
        mixture:
          - {tokens: 190e9, text_share: 0.9}
          - {text_share: 0.5, domains: [{name: text, weight: 1}, {name: vqa, weight: 1}]}
        packing: {enabled: true, max_global_views: 64, max_crops: 400}
        """
    )
    assert problems == []
    assert section.domains[0] == DomainConfig("text", ["t.jsonl"], "text", weight=2.0)
    assert section.domains[1].max_epochs == 4.0 and section.domains[1].modality == "multimodal"
    assert section.mixture[0] == MixturePhase(tokens=190_000_000_000, text_share=0.9)
    assert section.mixture[1].domains == [DomainShare("text", 1.0), DomainShare("vqa", 1.0)]
    assert section.packing == PackingConfig(enabled=True, max_global_views=64, max_crops=400)
    again, problems = load(yaml.safe_dump(to_mapping(section)))
    assert problems == [] and again == section


def test_what_concerns_one_key():
    _, problems = load(
        """
        domains: [{name: a, modality: video}, {paths: [a]}, {name: b, weight: -1}]
        mixture: [{text_share: 1.5}, {tokens: 0}]
        packing: {pad_multiple: 0, max_crop: 3}
        """
    )
    for said in (
        "data.domains[0].modality = video: must be one of text, multimodal",
        "data.domains[1].name: is required",
        "data.domains[2].weight = -1: must be at least 0",
        "data.mixture[0].text_share = 1.5: must be at most 1",
        "data.mixture[1].tokens = 0: must be at least 1",
        "data.packing.pad_multiple = 0: must be at least 1",
        "data.packing.max_crop: unknown key; did you mean data.packing.max_crops?",
    ):
        assert any(said in problem for problem in problems), (said, problems)
