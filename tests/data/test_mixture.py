"""Mixtures: the shares of the plan at every moment, epochs, phases that follow each other, and wrong ones."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.config.mixture import DomainShare, MixturePhase
from megatron_vl.data.make_plan import make_plan
from megatron_vl.data.mixture import documents_between, start_phase
from megatron_vl.data.plan_report import phase_totals, record_of, report_lines
from megatron_vl.data.streams import DomainStream
from megatron_vl.errors import ConfigErrors, DataError
from tests.data.planned import (
    LENGTH,
    documents_in,
    domain,
    image_index,
    index_of,
    plan_of,
    settings_of,
    text_index,
)

TEXT, VQA = text_index("text", 3000, 1, 0.02), image_index("vqa", 900, 2, 0.02)
DOMAINS = (domain("text", weight=1.0, modality="text"), domain("vqa", weight=1.0))
STEP_TOKENS = 8 * LENGTH


def test_every_prefix_is_near_the_shares():
    """Each domain is within the longest documents of its share of the tokens so far."""
    lengths = [text_index(name, 500, seed).tokens for seed, name in enumerate("abc")]
    streams = [DomainStream(name, tokens, 3) for name, tokens in zip("abc", lengths)]
    domains = [domain(name, weight=weight) for name, weight in zip("abc", (1.0, 0.3, 6.0))]
    order = start_phase(domains, MixturePhase(), streams, (0, 0, 0))
    end = order.window_begin(streams, 400_000)
    stretch = documents_between(streams, order, order.begin, order.begin_tokens, end)
    assert len(stretch) > 600 and end[2] > 500, "the third domain repeats"
    cumulated = np.cumsum(
        np.stack([np.where(stretch.domains == n, stretch.tokens, 0) for n in range(3)]), axis=1
    )
    wanted = cumulated.sum(axis=0) * np.array(order.shares)[:, None]
    assert np.abs(cumulated - wanted).max() <= sum(int(tokens.max()) for tokens in lengths)
    assert order.shares == pytest.approx((1 / 7.3, 0.3 / 7.3, 6 / 7.3))
    for number, stream in enumerate(streams):  # each stream in its own order, nothing left out
        mine = stretch.indices[stretch.domains == number]
        assert mine.tolist() == stream.indices(0, end[number]).tolist()


def test_a_window_needs_nothing_that_came_before():
    streams = [DomainStream(name, text_index(name, 300, 1).tokens, 3) for name in "ab"]
    domains = [domain(name, weight=1.0 + n) for n, name in enumerate("ab")]
    order = start_phase(domains, MixturePhase(), streams, (10, 20))
    places = [order.window_begin(streams, 50_000 * n) for n in range(6)]
    tokens = [tuple(s.tokens_before(p) for s, p in zip(streams, place)) for place in places]
    whole = documents_between(streams, order, places[0], tokens[0], places[5])
    parts = [documents_between(streams, order, places[n], tokens[n], places[n + 1]) for n in range(5)]
    assert [int(i) for part in parts for i in part.indices] == whole.indices.tolist()
    assert [int(d) for part in parts for d in part.domains] == whole.domains.tolist()


def test_realised_shares_of_two_phases_are_those_of_the_plan():
    phases = (MixturePhase(tokens=60 * STEP_TOKENS, text_share=0.9), MixturePhase(text_share=0.5))
    plan = plan_of([TEXT, VQA], num_steps=160, phases=phases)
    first, second = phase_totals(plan)
    assert (first.rows, second.rows) == (60 * 8, 100 * 8)
    for phase, share in ((first, 0.9), (second, 0.5)):
        assert phase.text_share == pytest.approx(share, abs=0.01)
        for found in phase.domains:
            assert found.share == pytest.approx(found.wanted, abs=0.01)
        assert phase.efficiency > 0.96
    # Counted again from the rows themselves, and at every tenth step of each phase.
    tokens = Counter()
    for step in range(160):
        if step == 60:
            tokens.clear()
        for document in (d for row in plan.step(step) for d in row.documents):
            tokens[document.domain] += document.tokens
        if step in (59, 159):
            totals = first if step == 59 else second
            assert [tokens[n] for n in range(2)] == [found.tokens for found in totals.domains]
        elif step % 60 >= 20 and step % 10 == 0:
            share = tokens[0] / sum(tokens.values())
            assert share == pytest.approx(0.9 if step < 60 else 0.5, abs=0.03), step


def test_phases_go_on_with_the_next_document():
    """Each domain's documents over both phases are its stream from the first on, each once."""
    phases = (MixturePhase(tokens=23 * STEP_TOKENS, text_share=0.8), MixturePhase(text_share=0.3))
    plan = plan_of([TEXT, VQA], num_steps=50, phases=phases)
    rows = plan.rows(0, int(plan.windows.first_row[-1]))
    assert plan.windows.first_row[np.flatnonzero(plan.windows.phase == 1)[0]] == 23 * 8
    assert all(row.tokens for row in rows)
    for number in range(2):
        found = [index for _, index in documents_in(rows, number)]
        stream = plan.domains[number].stream
        assert sorted(found) == sorted(stream.indices(0, len(found)).tolist())


@pytest.mark.parametrize("packed", [True, False])
def test_epochs_hold_each_document_exactly_once_each(packed):
    domains = (domain("text", epochs=1, modality="text"), domain("vqa", epochs=2))
    plan = plan_of([TEXT, VQA], domains=domains, phases=(MixturePhase(),), packed=packed)
    rows = [row for step in range(plan.num_steps) for row in plan.step(step)]
    assert len(rows) == plan.num_steps * 8
    counts = Counter(documents_in(rows))
    assert counts == {(0, n): 1 for n in range(3000)} | {(1, n): 2 for n in range(900)}
    totals = phase_totals(plan)[0]
    assert [found.epochs for found in totals.domains] == [1.0, 2.0]
    assert totals.empty_rows == sum(row.tokens == 0 and not row.documents for row in rows) or not packed
    # a second phase in epochs begins each domain's next epoch
    again = plan_of([TEXT, VQA], domains=domains, phases=(MixturePhase(), MixturePhase()), packed=packed)
    later = [row for step in range(plan.num_steps, again.num_steps) for row in again.step(step)]
    assert Counter(documents_in(later)) == counts


@pytest.mark.parametrize("seed", range(6))
def test_refused_documents_at_the_end_of_an_epoch_are_reported_as_well(seed):
    """They are due when the epoch is over: no token comes after them."""
    index = index_of("text", [50] * 40, refused=range(30))
    only = [domain("text", epochs=2, modality="text")]
    plan = plan_of(
        [index],
        domains=only,
        seed=seed,
        global_batch_size=1,
        seq_length=1000,
        pad_multiple=10,
        look_ahead_rows=1,
    )
    rows = [row for step in range(plan.num_steps) for row in plan.step(step)]
    assert Counter(documents_in(rows)) == {(0, n): 2 for n in range(40)}
    assert plan.num_steps == 1, "no row of their own"


def test_epochs_after_weights_begin_anew():
    phases = (MixturePhase(tokens=5 * STEP_TOKENS), MixturePhase(domains=[DomainShare("vqa", epochs=1)]))
    plan = plan_of([TEXT, VQA], phases=phases)
    before = documents_in([row for step in range(5) for row in plan.step(step)], 1)
    assert 0 < len(before) < 900
    rows = [row for step in range(5, plan.num_steps) for row in plan.step(step)]
    assert Counter(documents_in(rows)) == {(1, n): 1 for n in range(900)}


def test_part_of_an_epoch_and_a_domain_left_out():
    shares = [DomainShare("vqa", epochs=0.5)]
    plan = plan_of([TEXT, VQA], phases=(MixturePhase(domains=shares),))
    rows = [row for step in range(plan.num_steps) for row in plan.step(step)]
    counts = Counter(documents_in(rows))
    assert {number for number, _ in counts} == {1} and set(counts.values()) == {1}
    assert phase_totals(plan)[0].domains[1].epochs == pytest.approx(0.5, abs=0.01)


def test_the_order_of_a_domain_does_not_depend_on_the_others():
    alone = plan_of([VQA], num_steps=3, domains=(DOMAINS[1],))
    both = plan_of([VQA, TEXT], num_steps=30, domains=DOMAINS[::-1])
    order = [stream.indices(0, 50).tolist() for stream in (alone.domains[0].stream, both.domains[0].stream)]
    assert order[0] == order[1]


def test_a_domain_smaller_than_one_batch_repeats_and_is_said():
    small = image_index("vqa", 3, 5)
    plan = plan_of([TEXT, small], num_steps=10)
    totals = phase_totals(plan)[0]
    assert totals.domains[1].share == pytest.approx(0.5, abs=0.02) and totals.domains[1].epochs > 10
    assert any("vqa" in line and "repeats within a step" in line for line in report_lines(plan))
    limited = (DOMAINS[0], replace(DOMAINS[1], max_epochs=4.0))
    with pytest.raises(DataError, match=r"repeats domain vqa .* times, more than its max_epochs = 4"):
        plan_of([TEXT, small], num_steps=10, domains=limited)


def test_an_empty_domain_is_an_error_unless_nothing_is_asked_of_it():
    empty = index_of("vqa", [10, 20], refused=[0, 1])
    with pytest.raises(DataError, match="domain vqa is empty: none of its 2 samples"):
        plan_of([TEXT, empty], num_steps=2)
    off = (DOMAINS[0], replace(DOMAINS[1], weight=0.0))
    plan = plan_of([TEXT, empty], num_steps=2, domains=off)
    assert phase_totals(plan)[0].domains[1].tokens == 0


def test_text_domains_hold_no_images():
    with pytest.raises(DataError, match="domain vqa is of modality text, but .* samples have images"):
        plan_of([VQA], num_steps=2, domains=(domain("vqa", weight=1.0, modality="text"),))


def test_a_plan_has_an_end():
    with pytest.raises(DataError, match="the plan has no end"):
        plan_of([TEXT, VQA])
    with pytest.raises(DataError, match=r"the phases of data.mixture make \d+ steps, the run has 10000"):
        epochs = MixturePhase(domains=[DomainShare("text", epochs=1)])
        make_plan(settings_of(phases=(epochs,)), [TEXT, VQA], 10_000)
    assert plan_of([TEXT, VQA], phases=(MixturePhase(tokens=5 * STEP_TOKENS - 1),)).num_steps == 5


def test_wrong_mixtures_are_config_errors():
    """The rules themselves are tested beside `plan.mixture_checks`; a plan is never made against them."""
    with pytest.raises(ConfigErrors, match="weights sum to zero"):
        plan_of([TEXT, VQA], num_steps=2, domains=[replace(d, weight=0.0) for d in DOMAINS])


def test_report_and_record_say_the_same():
    phases = (MixturePhase(tokens=4 * STEP_TOKENS, text_share=0.9), MixturePhase(text_share=0.5))
    plan = plan_of([TEXT, VQA], num_steps=10, phases=phases)
    record, lines = record_of(plan), report_lines(plan, dp_size=4)
    assert record["steps"] == 10 and [phase["rows"] for phase in record["phases"]] == [32, 48]
    assert lines[0] == "Data plan: 10 steps of 8 rows of 4,096 tokens, packed in multiples of 16"
    assert sum(line.startswith("  phase") for line in lines) == 2
    for phase in record["phases"]:
        assert any(f"{phase['tokens']:,} tokens" in line for line in lines)
    refused = int((TEXT.reasons > 0).sum())
    assert record["refused"]["text"] == {"missing": refused}
    assert f"  refused in domain text: {refused} of 3,000 samples: missing {refused}" in lines
    assert lines[-1].startswith("  largest / mean over 4 data-parallel ranks")
