"""Rules of mixture and packing: all problems at once, each with its remedy."""

from dataclasses import replace

import pytest

from megatron_vl.config.mixture import DomainConfig, DomainShare, MixturePhase, PackingConfig
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.plan.mixture import asks_of, weighted_shares
from megatron_vl.plan.mixture_checks import check_mixture, check_packing

TEXT = DomainConfig("text", ["t.jsonl"], "text", weight=3.0)
CODE = DomainConfig("code", ["c.jsonl"], "text", weight=1.0)
VQA = DomainConfig("vqa", ["v.jsonl"], "multimodal", weight=5.0)
LAST = MixturePhase()


def problems(domains, phases=()) -> list[str]:
    return [str(problem) for problem in check_mixture(domains, phases)]


def test_right_ones():
    phases = [MixturePhase(tokens=10, text_share=0.9), MixturePhase(text_share=0.5)]
    assert problems([TEXT, CODE, VQA]) == problems([TEXT, CODE, VQA], phases) == []
    assert problems([TEXT], [MixturePhase(text_share=1.0)]) == []
    assert problems([VQA], [MixturePhase(domains=[DomainShare("vqa", epochs=2)])]) == []
    assert problems([]) == []


def test_shares():
    domains = [TEXT, CODE, VQA]
    asks = asks_of(domains, LAST)
    assert weighted_shares(domains, asks, None) == pytest.approx([3 / 9, 1 / 9, 5 / 9])
    assert weighted_shares(domains, asks, 0.9) == pytest.approx([0.675, 0.225, 0.1])
    assert weighted_shares([TEXT, CODE], asks_of([TEXT, CODE], LAST), 1.0) == pytest.approx([0.75, 0.25])
    named = asks_of(domains, MixturePhase(domains=[DomainShare("vqa", 2.0), DomainShare("code", 6.0)]))
    assert weighted_shares(domains, named, None) == pytest.approx([0, 0.75, 0.25])


@pytest.mark.parametrize(
    ("domains", "phases", "said"),
    [
        ([replace(TEXT, epochs=1.0)], [], "data.domains[0].epochs = 1.0: stands beside weight = 3.0"),
        ([replace(TEXT, weight=-1.0), CODE], [], "data.domains[0].weight = -1.0: must be at least 0"),
        ([replace(TEXT, weight=0.0)], [], "data.domains: the weights sum to zero"),
        ([replace(TEXT, weight=None, epochs=0.0)], [], "data.domains: the epochs sum to zero"),
        ([replace(TEXT, weight=None)], [LAST], "data.mixture[0]: the weights sum to zero"),
        ([TEXT, replace(CODE, weight=None, epochs=1.0)], [], "some domains have weights, others epochs"),
        ([TEXT, replace(CODE, name="text")], [], "name = text: must be given and unique"),
        ([replace(TEXT, paths=[])], [], "data.domains[0].paths = []: the domain has no file"),
        ([TEXT], [MixturePhase(text_share=0.9)], "leaves 0.1 to multimodal domains"),
        ([VQA], [MixturePhase(text_share=0.9)], "leaves 0.9 to text domains"),
        ([replace(TEXT, weight=None, epochs=1.0)], [MixturePhase(text_share=1.0)], "epochs already fix the"),
        ([replace(TEXT, weight=None, epochs=1.0)], [MixturePhase(tokens=5)], "epochs already fix the length"),
        ([TEXT], [LAST, LAST], "data.mixture[0].tokens = none: only the last phase"),
        ([TEXT], [MixturePhase(domains=[DomainShare("txt", 1.0)])], "did you mean text?"),
        ([TEXT], [MixturePhase(domains=[DomainShare("text", 1.0)] * 2)], "stands twice in this phase"),
        ([TEXT], [MixturePhase(domains=[DomainShare("text", 1.0, 2.0)])], "stands beside weight = 1.0"),
    ],
)
def test_wrong_ones(domains, phases, said):
    found = problems(domains, phases)
    assert any(said in problem for problem in found), found


def test_all_problems_at_once():
    found = problems([replace(TEXT, epochs=1.0), replace(CODE, paths=[]), replace(VQA, name="code")])
    assert len(found) == 5, found  # both, no file, two equal names, weights beside epochs


def test_packing_and_the_layout():
    packing = PackingConfig(enabled=True)
    assert check_packing(packing, ParallelConfig(context_parallel_size=16), 131_072, 1) == []
    wide = ParallelConfig(tensor_model_parallel_size=8, context_parallel_size=8, sequence_parallel=True)
    (problem,) = check_packing(packing, wide, 131_072, 1)
    assert "data.packing.pad_multiple = 32: must be a multiple of 128" in str(problem)
    assert "choose 128" in str(problem)
    assert check_packing(replace(packing, pad_multiple=128), wide, 131_072, 1) == []
    found = [str(p) for p in check_packing(packing, ParallelConfig(), 1000, 2)]
    assert len(found) == 2 and "choose 1024" in found[0] and "micro_batch_size = 2: must be 1" in found[1]
    assert check_packing(PackingConfig(), wide, 1000, 2) == []
