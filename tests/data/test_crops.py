"""Crop geometry against the golden sizes, the table of worked examples and the token strings."""

import hashlib
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.config.model import SpecialTokens
from megatron_vl.data.crops import (
    CropRule,
    check_limits,
    image_ids_rle,
    image_token_ids,
    num_image_features,
    num_image_tokens,
    plan_crops,
)
from megatron_vl.errors import ImageRefused

GOLDEN = Path(__file__).parent.parent / "golden" / "preprocess"
LE, LT = CropRule(boundary_rule="le"), CropRule(boundary_rule="lt")
TOKENS = SpecialTokens()

# width, height, size after padding and limit, window, canvas, crops, newlines, tokens
WORKED_EXAMPLES = [
    (LE, 640, 480, (640, 480), 0, None, 0, 0, 171),
    (LE, 605, 605, (605, 605), 0, None, 0, 0, 171),
    (LE, 729, 729, (729, 729), 504, (1008, 1008), 4, 1, 504),
    (LE, 1000, 600, (1000, 600), 504, (1008, 504), 2, 0, 337),
    (LE, 1108, 504, (1108, 504), 504, (1008, 504), 2, 0, 337),
    (LE, 1109, 504, (1109, 504), 504, (1512, 504), 3, 0, 420),
    (LE, 1920, 1080, (1920, 1080), 504, (2016, 1008), 8, 1, 836),
    (LE, 1080, 1920, (1080, 1920), 504, (1008, 2016), 8, 3, 838),
    (LE, 4000, 3000, (3024, 2268), 504, (3024, 2520), 30, 4, 2665),
    (LE, 3024, 3024, (3024, 3024), 504, (3024, 3024), 36, 5, 3164),
    (LE, 1200, 250, (1200, 250), 250, (1250, 250), 5, 0, 586),
    (LE, 600, 300, (600, 300), 300, (600, 300), 2, 0, 337),
    (LE, 1000, 300, (1000, 300), 504, (1008, 300), 2, 0, 337),
    (LE, 100, 20, (100, 100), 0, None, 0, 0, 171),
    (LE, 200, 30, (200, 200), 0, None, 0, 0, 171),
    (LE, 5000, 400, (3024, 241), 241, (3133, 241), 13, 0, 1250),
    (LE, 728, 728, (728, 728), 0, None, 0, 0, 171),
    (LT, 728, 728, (728, 728), 504, (1008, 1008), 4, 1, 504),
    (LE, 728, 400, (728, 400), 400, (800, 400), 2, 0, 337),
    (LT, 728, 400, (728, 400), 504, (1008, 400), 2, 0, 337),
    (LE, 2000, 33, (2000, 33), 33, (2013, 33), 61, 0, 5234),
    (LE, 32, 200, (32, 200), 32, (32, 224), 7, 6, 758),
    (LE, 3024, 756, (3024, 756), 504, (3024, 1008), 12, 1, 1168),
    (LE, 3024, 755, (3024, 755), 504, (3024, 1008), 12, 1, 1168),
    (LE, 1, 1, (1, 1), 0, None, 0, 0, 171),
    (LE, 1, 5000, (3024, 3024), 504, (3024, 3024), 36, 5, 3164),
]


@pytest.mark.parametrize(
    "rule, width, height, resized, window, canvas, crops, newlines, tokens", WORKED_EXAMPLES
)
def test_worked_examples(rule, width, height, resized, window, canvas, crops, newlines, tokens):
    plan = plan_crops(width, height, rule)
    assert (plan.resized, plan.window, plan.canvas) == (resized, window, canvas)
    assert (plan.num_crops, plan.num_newlines, num_image_tokens(plan)) == (crops, newlines, tokens)


@pytest.mark.parametrize(
    "width, height, crops, tokens",
    [
        (3024, 32, 95, 8056),
        (5000, 40, 126, 10629),
        (40, 5000, 126, 10754),
        (10000, 32, 336, 28059),
        (3024, 100, 31, 2744),
    ],
)
def test_thin_images_have_many_crops(width, height, crops, tokens):
    plan = plan_crops(width, height)
    assert (plan.num_crops, num_image_tokens(plan)) == (crops, tokens)


@pytest.mark.parametrize("rule", [LE, LT], ids=["le", "lt"])
def test_golden_sizes(rule):
    golden = json.loads((GOLDEN / "sizes.json").read_text())
    assert len(golden["rows"]) == 400
    for row in golden["rows"]:
        plan = plan_crops(*row["size"], rule)
        layout = [
            *plan.resized,
            plan.window,
            *(plan.canvas or (0, 0)),
            plan.cols,
            plan.rows,
            num_image_tokens(plan),
        ]
        assert layout == row.get(rule.name, row["le728"]), row["size"]


def test_one_fifth_is_tested_in_floating_point():
    assert plan_crops(1050, 250).cols == 5  # 1050/250 - 4 is slightly above 0.2
    assert plan_crops(820, 100, CropRule(global_size=100)).cols == 8  # 820/100 - 8 is slightly below


def test_id_string_of_729x729():
    crop = [151689, *[151679] * 81, 151690]
    expected = crop * 2 + [151691] + crop * 2 + [151680, *[151679] * 169, 151681]
    assert image_token_ids(plan_crops(729, 729), TOKENS) == expected
    assert len(expected) == 504


def test_golden_prompts_expand_to_the_golden_ids():
    golden = json.loads((GOLDEN / "expected.json").read_text())
    sizes = {case["id"]: (case["size"], case["rule"]) for case in golden["cases"]}
    for prompt in golden["prompts"]:
        images = iter(prompt["images"])
        ids = []
        for token in prompt["ids"]:
            if token != TOKENS.im_patch:
                ids.append(token)
                continue
            (width, height), rule = sizes[next(images)]
            ids += image_token_ids(plan_crops(width, height, LT if rule == "lt728" else LE), TOKENS)
        assert len(ids) == prompt["expanded_length"]
        assert hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest() == prompt["expanded_sha256"]


def test_counts_boxes_and_newlines_agree_on_random_sizes():
    generator = random.Random(0)
    for _ in range(300):
        width, height = (int(2 ** generator.uniform(0, 12.5)) for _ in range(2))
        plan = plan_crops(width, height, generator.choice([LE, LT]))
        ids = image_token_ids(plan, TOKENS)
        assert len(ids) == num_image_tokens(plan)
        assert ids.count(TOKENS.im_patch) == num_image_features(plan)
        assert ids.count(TOKENS.patch_newline) == max(plan.rows - 1, 0) == len(plan.newline_after_crops)
        assert plan.view_kinds == [0] * plan.num_crops + [1]
        covered = set()
        for crop in range(plan.num_crops):
            left, top, right, bottom = plan.box(crop)
            assert right - left == bottom - top == plan.window
            covered.add((left, top))
        assert len(covered) == plan.num_crops
        if plan.canvas:
            last = plan.box(plan.num_crops - 1)
            assert last[2] >= plan.canvas[0] and last[3] >= plan.canvas[1]


def test_constants_scale_with_the_model():
    rule = CropRule.for_model(global_size=112, crop_size=56)
    assert (rule.max_side, rule.name) == (336, "le112")
    assert plan_crops(112, 112, rule).num_crops == 0
    plan = plan_crops(1000, 1000, rule)
    assert (plan.resized, plan.window, plan.num_crops) == ((336, 336), 56, 36)
    assert num_image_tokens(plan, global_tokens=4, crop_tokens=1) == 36 * 3 + 5 + 6
    runs = image_ids_rle(plan_crops(60, 40, rule), TOKENS, global_tokens=4, crop_tokens=1)
    assert runs == [(151680, 1), (151679, 4), (151681, 1)]
    assert CropRule.for_model(728, 504) == CropRule()


@pytest.mark.parametrize(
    "size, limits, reason",
    [
        ((3024, 3024), {"max_crops": 36}, None),
        ((10000, 32), {"max_crops": 336}, None),
        ((10000, 32), {"max_crops": 36}, "too_many_crops"),
        ((10000, 32), {}, None),
        ((1000, 100), {"max_aspect_ratio": 10}, None),
        ((100, 1001), {"max_aspect_ratio": 10}, "aspect_ratio"),
        ((1, 60000), {"max_pixels": 178_956_970}, "too_many_pixels"),
        ((32, 60000), {"max_pixels": 178_956_970}, None),
        ((0, 5), {}, "zero_size"),
        ((200000, 32), {}, "too_thin"),
    ],
)
def test_limits_refuse_with_a_reason(size, limits, reason):
    if reason is None:
        check_limits(plan_crops(*size), **limits)
        return
    with pytest.raises(ImageRefused) as refusal:
        check_limits(plan_crops(*size), **limits)
    assert refusal.value.reason == reason
    assert str(size[0]) in refusal.value.detail


def test_geometry_needs_no_torch():
    modules = "{'torch', 'numpy', 'PIL'}"
    code = f"import megatron_vl.data.crops, sys; sys.exit(bool({modules} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
