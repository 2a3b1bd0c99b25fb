"""The fused head: values and gradients of whole logits, in a fraction of their memory."""

import math

import pytest
import torch

from megatron_vl.bench.storage import TrackStorage
from megatron_vl.config.schema import ParallelConfig
from megatron_vl.ops.cross_entropy import HeadShard, Scoring, score_tokens
from megatron_vl.parity.compare import relative
from tests.ops import on_ranks
from tests.ops.plain import make_case, plain_scores


class Alone:
    """A group of one rank; any collective on it would fail."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def shard(vocab: int, chunk: int) -> HeadShard:
    return HeadShard(vocab, Alone(), False, chunk)


def leaves(case, padding: int = 0, dtype=torch.float32):
    weight = torch.cat([case.weight, torch.ones(padding, case.weight.shape[1])])
    return case.hidden.to(dtype).clone().requires_grad_(), torch.nn.Parameter(weight.to(dtype))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(chunk, temperature, entropy):
    case = make_case(length=11, batch=3, vocab=53)
    expected = plain_scores(case, temperature, entropy)
    hidden, weight = leaves(case, padding=3)
    scores = score_tokens(
        hidden, weight, case.labels, shard(53, chunk), Scoring(temperature, entropy, best=True)
    )
    total = scores.losses * case.of_loss
    (total + scores.entropy * case.of_entropy if entropy else total).sum().backward()
    assert scores.losses.dtype == torch.float32 and scores.losses.shape == case.labels.shape
    assert torch.equal(scores.best, expected.best) and torch.equal(scores.logprobs, -scores.losses)
    assert relative(scores.losses.detach(), expected.losses) < 1e-6
    if entropy:
        assert relative(scores.entropy.detach(), expected.entropy) < 1e-6
    else:
        assert scores.entropy is None
    assert relative(hidden.grad, expected.grad_hidden) < 1e-6
    assert relative(weight.grad[:53], expected.grad_weight) < 1e-6 and weight.grad[53:].abs().max() == 0


def test_the_entropy_alone_can_be_differentiated():
    case = make_case(length=9, batch=1, vocab=31)
    case.of_loss.zero_()
    hidden, weight = leaves(case)
    scores = score_tokens(hidden, weight, case.labels, shard(31, 4), Scoring(entropy=True))
    (scores.entropy * case.of_entropy).sum().backward()
    expected = plain_scores(case)
    assert relative(hidden.grad, expected.grad_hidden) < 1e-6
    assert relative(weight.grad, expected.grad_weight) < 1e-6


def test_a_row_that_is_masked_whole_gives_zeros_and_no_nan():
    case = make_case(length=8, batch=2, vocab=31, share=0.0)
    hidden, weight = leaves(case)
    scores = score_tokens(hidden, weight, case.labels, shard(31, 4), Scoring(entropy=True, best=True))
    assert scores.losses.abs().max() == 0 and scores.entropy.abs().max() == 0 and (scores.best == -1).all()
    (scores.losses.sum() + scores.entropy.sum()).backward()
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_large_logits_overflow_nothing():
    case = make_case(length=6, batch=1, vocab=17, share=1.0)
    case.hidden *= 1e4
    hidden, weight = leaves(case)
    scores = score_tokens(hidden, weight, case.labels, shard(17, 4), Scoring(entropy=True))
    expected = plain_scores(case)
    assert relative(scores.losses.detach(), expected.losses) < 1e-6
    assert scores.entropy.isfinite().all()
    scores.losses.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_nan_reaches_the_loss():
    """The train step stops at a loss that is not finite: it must not be lost on the way."""
    case = make_case(length=6, batch=1, vocab=17, share=1.0)
    case.hidden[2, 0, 0] = math.nan
    scores = score_tokens(*leaves(case), case.labels, shard(17, 4), Scoring())
    assert scores.losses[0, 2].isnan() and scores.losses.isnan().sum() == 1


@pytest.mark.parametrize("label", [31, 33, 10**6])
def test_a_label_that_is_no_word_has_infinite_loss(label):
    case = make_case(length=4, batch=1, vocab=31, share=1.0)
    case.labels[0, 1] = label
    scores = score_tokens(*leaves(case, padding=3), case.labels, shard(31, 4), Scoring())
    assert scores.losses[0, 1] == math.inf and scores.losses.isfinite().sum() == 3


def test_a_frozen_head_and_frozen_hidden_states():
    case = make_case(length=9, batch=1, vocab=31)
    expected = plain_scores(case, with_entropy=False)
    hidden, weight = leaves(case)
    weight.requires_grad_(False)
    (
        score_tokens(hidden, weight, case.labels, shard(31, 4), Scoring()).losses * case.of_loss
    ).sum().backward()
    assert weight.grad is None and relative(hidden.grad, expected.grad_hidden) < 1e-6
    hidden, weight = leaves(case)
    scores = score_tokens(hidden.detach(), weight, case.labels, shard(31, 4), Scoring())
    (scores.losses * case.of_loss).sum().backward()
    assert relative(weight.grad, expected.grad_weight) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_main_grad_in_fp32(dtype):
    case = make_case(length=40, batch=2, vocab=31)
    case.hidden, case.weight = (t.to(dtype).float() for t in (case.hidden, case.weight))
    expected = plain_scores(case, with_entropy=False)
    hidden, weight = leaves(case, dtype=dtype)
    weight.main_grad = torch.ones(weight.shape)
    for _ in range(2):
        scores = score_tokens(hidden, weight, case.labels, shard(31, 7), Scoring())
        (scores.losses * case.of_loss).sum().backward()
    assert weight.grad is None
    bound = 1e-6 if dtype == torch.float32 else 1e-2  # bf16 logits and gradients, as in Megatron-Core's head
    assert relative(weight.main_grad - 1, 2 * expected.grad_weight) < bound


def test_chunks_are_added_up_in_fp32():
    """A sum of 4096 equal gradients in bf16 would stop growing at 256 of them."""
    weight = torch.nn.Parameter(torch.zeros(2, 8, dtype=torch.bfloat16))
    hidden = torch.ones(4096, 1, 8, dtype=torch.bfloat16)
    scores = score_tokens(hidden, weight, torch.zeros(1, 4096, dtype=torch.int64), shard(2, 16), Scoring())
    scores.losses.sum().backward()
    assert torch.equal(weight.grad.float(), torch.tensor([[-2048.0], [2048.0]]).expand(2, 8))


def test_memory_is_that_of_a_chunk():
    """Peak of live tensor storage beyond the inputs, forward and backward, counted at every operation."""
    length, vocab, width, chunk = 1024, 4000, 32, 64
    case = make_case(length, 1, vocab, width, share=1.0)

    def peak(run) -> TrackStorage:
        hidden, weight = leaves(case)
        weight.main_grad = torch.zeros(weight.shape)
        with TrackStorage() as track:
            run(hidden, weight).sum().backward()
        return track

    def whole(hidden, weight):
        logits = (hidden @ weight.t()).float()
        return torch.nn.functional.cross_entropy(logits.transpose(0, 1)[0], case.labels[0], reduction="none")

    plain = peak(whole)
    fused = peak(lambda h, w: score_tokens(h, w, case.labels, shard(vocab, chunk), Scoring()).losses)
    entropy = peak(
        lambda h, w: score_tokens(h, w, case.labels, shard(vocab, chunk), Scoring(entropy=True)).entropy
    )
    logits, all_logits = 4 * vocab * chunk, 4 * vocab * length
    assert plain.largest >= all_logits and plain.peak >= all_logits
    assert fused.largest == logits and fused.peak < 1.5 * logits < all_logits / 10
    assert entropy.largest == logits and entropy.peak < 2.5 * logits


LAYOUTS = {
    "1": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "tp4": ParallelConfig(tensor_model_parallel_size=4),
    "tp4sp": ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
}
# Vocabulary, chunk, share of scored tokens. Most are not divided by TP; with 5 words on 4 ranks the last has none.
HEADS = [(48, 5, 0.6), (45, 100, 1.0), (47, 4, 0.0), (5, 3, 0.6)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_whole_logits_and_megatron(world, layout):
    parallel = LAYOUTS[layout]
    answers = world.run(
        parallel.tensor_model_parallel_size, on_ranks.distances, parallel, HEADS, torch.float32
    )
    for found in [found for of_rank in answers for found in of_rank]:
        assert found.pop("best") == 0 and found.pop("zero rows") == 0
        bounds = {name: 1e-6 if "Megatron" in name else 3e-6 for name in found}  # the others are from fp64
        assert {name: far for name, far in found.items() if not far < bounds[name]} == {}


@pytest.mark.parametrize("layout", ["tp2", "tp2sp"])
def test_ranks_in_bf16_equal_megatron(world, layout):
    found = world.run(2, on_ranks.distances, LAYOUTS[layout], [(48, 5, 0.6)], torch.bfloat16)
    for (far,) in found:
        assert far["losses, Megatron"] < 1e-6
        assert max(far["grad hidden, Megatron"], far["grad weight, Megatron"]) < 5e-3
        assert far["losses"] < 1e-2 and 1e-4 < far["grad weight"] < 2e-2
