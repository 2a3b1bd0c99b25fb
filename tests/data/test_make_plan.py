"""Making plans: pure, the longer one begins with the shorter one, kept on disk, a million documents in seconds."""

import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.config.mixture import MixturePhase
from megatron_vl.config.model import ModelConfig
from megatron_vl.data.make_plan import load_plan, make_plan, plan_file, plan_of_run, save_plan
from megatron_vl.data.plan_report import phase_totals
from megatron_vl.errors import DataError
from megatron_vl.plan.row_work import WorkRates
from tests.data.planned import LENGTH, documents_in, domain, image_index, plan_of, settings_of, text_index

INDICES = [text_index("text", 3000, 1, 0.02), image_index("vqa", 900, 2, 0.02)]
STEP_TOKENS = 8 * LENGTH
PHASES = (MixturePhase(tokens=25 * STEP_TOKENS, text_share=0.7), MixturePhase(text_share=0.4))


def steps_of(plan, steps):
    return [documents_in(plan.step(step)) for step in range(steps)]


def test_a_longer_plan_begins_with_the_shorter_one():
    long = steps_of(plan_of(INDICES, 70, phases=PHASES), 70)
    for steps in (1, 10, 24, 25, 26, 50):
        assert steps_of(plan_of(INDICES, steps, phases=PHASES), steps) == long[:steps]


@pytest.mark.parametrize("packed", [True, False])
def test_every_phase_fills_its_rows_exactly(packed):
    for steps in (1, 7, 12):
        phases = (MixturePhase(tokens=steps * STEP_TOKENS), MixturePhase(text_share=0.4))
        plan = plan_of(INDICES, 20, phases=phases, packed=packed)
        first = phase_totals(plan)[0]
        assert first.rows == steps * 8 and first.empty_rows == 0
        assert phase_totals(plan)[1].rows == (20 - steps) * 8
        if not packed:
            assert all(len(row.documents) == 1 for step in range(20) for row in plan.step(step))


def test_look_ahead_makes_rows_fuller():
    efficiency = {}
    for rows in (1, 4, 64):
        plan = plan_of(INDICES, 40, look_ahead_rows=rows)
        efficiency[rows] = phase_totals(plan)[0].efficiency
    assert efficiency[1] < efficiency[4] < efficiency[64] and efficiency[64] > 0.965


def test_digest_is_of_what_decides_the_rows():
    settings = settings_of(phases=PHASES)
    digest = settings.digest(INDICES)
    same = [
        replace(settings, phases=(PHASES[0], replace(PHASES[1], tokens=9 * STEP_TOKENS))),
        replace(settings, domains=(replace(settings.domains[0], max_epochs=9.0), settings.domains[1])),
    ]
    assert {one.digest(INDICES) for one in same} == {digest}
    others = [
        replace(settings, seed=8),
        replace(settings, seq_length=2 * LENGTH),
        replace(settings, global_batch_size=16),
        replace(settings, pad_multiple=32),
        replace(settings, look_ahead_rows=33),
        replace(settings, max_globals=5),
        replace(settings, max_crops=5),
        replace(settings, balance=False),
        replace(settings, packed=False),
        replace(settings, rates=replace(settings.rates, per_crop=1)),
        replace(settings, phases=(replace(PHASES[0], tokens=1), PHASES[1])),
        replace(settings, phases=(PHASES[0], replace(PHASES[1], text_share=0.5))),
        replace(settings, domains=(replace(settings.domains[0], weight=2.0), settings.domains[1])),
    ]
    digests = [other.digest(INDICES) for other in others]
    digests.append(settings.digest([INDICES[0], replace(INDICES[1], digest="other data")]))
    assert len({digest, *digests}) == len(digests) + 1


def test_kept_on_disk(tmp_path):
    settings = settings_of(phases=PHASES)
    path = plan_file(tmp_path, settings, INDICES)
    assert load_plan(path, settings, INDICES, 5) is None
    plan = plan_of_run(tmp_path, settings, INDICES, 40)
    stored = load_plan(path, settings, INDICES, 40)
    assert steps_of(stored, 40) == steps_of(plan, 40)
    assert phase_totals(stored) == phase_totals(plan)
    assert load_plan(path, settings, INDICES, 5).num_steps == 5
    assert load_plan(path, settings, INDICES, 4000) is None
    assert plan_of_run(tmp_path, settings, INDICES, 80).num_steps == 80  # made anew, longer
    assert load_plan(path, settings, INDICES, 80) is not None

    other = replace(settings, seed=8)
    with pytest.raises(DataError, match="belongs to other data or settings"):
        load_plan(path, other, INDICES, 5)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="is damaged .* remove it"):
        load_plan(path, settings, INDICES, 5)


def test_a_stored_plan_does_not_reach_beyond_its_phases(tmp_path):
    phases = (MixturePhase(tokens=5 * STEP_TOKENS),)
    settings = settings_of(phases=phases)
    save_plan(make_plan(settings, INDICES), plan_file(tmp_path, settings, INDICES))
    with pytest.raises(DataError, match="the phases of data.mixture make 5 steps, the run has 6"):
        plan_of_run(tmp_path, settings, INDICES, 6)


def test_a_million_documents_would_take_seconds():
    """A tenth of it, at 128k tokens a row: 5 us of processor time per document are asked, 20 are allowed."""
    rng = np.random.default_rng(0)
    indices = [text_index("text", 60_000, 3), image_index("vqa", 40_000, 4)]
    settings = settings_of(
        (domain("text", epochs=1, modality="text"), domain("vqa", epochs=1)),
        seq_length=131_072, global_batch_size=32, look_ahead_rows=128, rates=WorkRates.of(ModelConfig()),
    )  # fmt: skip
    begin = time.process_time()
    plan = make_plan(settings, indices)
    seconds = time.process_time() - begin
    assert int(plan.windows.documents.sum()) == 100_000 and seconds < 2.0
    begin = time.process_time()
    for step in rng.integers(0, plan.num_steps, 5):
        plan.step(int(step))
    assert (time.process_time() - begin) / 5 < 0.5
