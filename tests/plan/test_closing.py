"""What follows the last micro-batch, and what hides: by hand, and over every layout of a search."""

from dataclasses import replace

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.schema import DataConfig, ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_vl.plan.candidates import Candidate, candidates
from megatron_vl.plan.closing import Closing, StageEnd, closing_of, closing_seconds
from megatron_vl.plan.devices import DEVICES
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.overlap import NONE, Overlap
from megatron_vl.plan.search import Planner, Question
from megatron_vl.plan.stages import held_stages
from megatron_vl.plan.state_bytes import buckets_of_stage, bytes_of_stage
from megatron_vl.plan.tensors import weights_of_chunk

BOTH = Overlap(True, True)
MODEL = ModelConfig()
END = StageEnd(0, sums=10.0, last=1.0, late=2.0, over_tp=0.5, gathers=6.0, ahead=1.5, optimizer=0.25)
H100 = replace(DEVICES["H100"], collective_seconds=0.0, inter_seconds=0.0)


def seconds(overlap, forward, backward, end=END, on_cpu=False):
    return closing_seconds(Closing([end], {}), overlap, on_cpu, forward, backward)


def test_one_stage_by_hand():
    assert seconds(NONE, [100.0], [100.0]) == {"dp": 10 + 2 + 0.5 + 6, "optimizer": 0.25}
    assert seconds(BOTH, [4.0], [7.0])["dp"] == pytest.approx(3 + 2 + 0.5 + 2)
    # however long the computation: the last bucket, the tower's, and what the first layer waits for
    assert seconds(BOTH, [100.0], [100.0])["dp"] == pytest.approx(1 + 2 + 0.5 + 1.5)
    assert seconds(Overlap(True, False), [100.0], [100.0])["dp"] == pytest.approx(1 + 2 + 0.5 + 6)
    assert seconds(BOTH, [100.0], [100.0], on_cpu=True) == seconds(NONE, [100.0], [100.0])


def test_later_stages_wait_for_the_first_anyway():
    end = replace(END, stage=2, late=0.0, over_tp=0.0)
    for overlap in (NONE, BOTH):
        assert seconds(overlap, [1.0, 2.0, 4.0], [2.0, 3.0, 6.0], end)["dp"] == pytest.approx(10 - 5 + 6 - 3)
        assert seconds(overlap, [100.0] * 3, [100.0] * 3, end)["dp"] == 0
    slowest = closing_seconds(
        Closing([END, end], {"dp": 1.0, "optimizer": 2.0}), NONE, False, [0.0] * 3, [0.0] * 3
    )
    assert slowest == {"dp": 18.5 + 1, "optimizer": 2.25}


@pytest.mark.parametrize("placement", ["data", "all"])
def test_the_bytes_are_those_of_the_state(placement):
    """Late buckets are the tower's and the projector's, rounded up to whole buckets; nothing is sent twice."""
    layout = Layout(tp=2, dp=4, pp=2, placement=placement)
    stages = held_stages(36, layout, None)
    chunks = [stage for stage in stages[0] if not stage.beside]
    bucket = 40_000_000
    found = buckets_of_stage(MODEL, layout, chunks, True, bucket)
    weights = weights_of_chunk(MODEL, layout, chunks[0])
    tower = sum(weight.size for weight in weights if weight.part != "decoder")
    assert tower <= found.late < tower + bucket + 1_000_000 if tower else found.late == 0
    embedding = next(weight.size for weight in weights if "word_embeddings" in weight.name)
    # the bucket that is filled last: the embedding, with what of the first layer no bucket was closed for
    assert embedding <= found.last < embedding + bucket and found.ahead == found.late + found.last
    held = bytes_of_stage(MODEL, layout, chunks, 2, True, bucket)
    closing = closing_of(MODEL, layout, H100, {0: (held, found)}, 2, True)
    (end,), elements = closing.ends, held.gradients // 4
    rate = 3 / 4 / H100.intra_bytes  # four replicas of two ranks are one node
    assert end.sums + end.late == pytest.approx(4 * elements * rate)
    assert end.gathers == pytest.approx(2 * elements * rate)
    assert (end.over_tp > 0) == (placement == "data")


def question(**parallel) -> Question:
    config = RunConfig(
        data=DataConfig(seq_length=4096),
        train=TrainConfig(global_batch_size=64),
        parallel=ParallelConfig(**parallel),
    )
    return Question(config, DEVICES["H100"], 16, 0.3)


def test_overlap_never_costs_and_never_hides_more_than_there_is():
    on, off = (Planner(question(**keys)) for keys in ({}, {"overlap_grad_reduce": False}))
    faster = 0
    for found in candidates(on.question.config, 16, 8, on.relief()):
        if not isinstance(found, Candidate):
            continue
        found = replace(found, recompute=RecomputeConfig())
        with_it, without = on.closing(found), off.closing(found)
        # more buckets, more latencies: of those that pipeline stages send behind, where nothing hides them
        assert with_it["dp"] <= without["dp"] + 0.02, found
        assert with_it["optimizer"] == pytest.approx(without["optimizer"], rel=1e-3)
        faster += with_it["dp"] < 0.7 * without["dp"]
    assert faster > 20
