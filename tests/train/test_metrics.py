"""What a step reports: counted, not estimated; and the same run in several layouts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_vl.plan.cost import sample_flops, tower_and_decoder, train_flops, view_costs
from megatron_vl.plan.layout import Layout
from megatron_vl.plan.vision_share import CROP, GLOBAL, share_views
from megatron_vl.train import metrics
from megatron_vl.train.console import clock, human
from megatron_vl.train.metrics import MetricsFile
from tests.train import on_ranks
from tests.train.tiny_run import LAYOUTS, TOKENS_PER_STEP, load, losses, make_files, read_lines, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("layout", ["1", "tp2pp2", "dp2tp2"])
def test_a_record_is_consistent_with_the_cost_model(world, data, tmp_path, layout):
    loaded = load(write_config(data, tmp_path / "run"), layout)
    ranks = world.run(LAYOUTS[layout][0], on_ranks.measured, loaded)
    record, size = ranks[0].record, len(ranks)
    assert all(rank.record == record for rank in ranks)
    # One rank of each data-parallel replica: the others hold the same documents.
    replicas = [ranks[0], ranks[2]] if layout == "dp2tp2" else [ranks[0]]
    batches = [batch for rank in replicas for batch in rank.views]
    tower = decoder = 0.0
    for kinds, lengths in batches:
        parts = tower_and_decoder(
            train_flops(loaded.config.model, sample_flops(loaded.config.model, kinds, lengths))
        )
        tower, decoder = tower + parts[0], decoder + parts[1]
    assert tower > 0 and decoder > 0
    assert record["model_tflops"] * 1e12 * record["step_seconds"] * size == pytest.approx(tower + decoder)
    assert record["tower_share"] == pytest.approx(tower / (tower + decoder))
    towers, works = [], []
    for rank in replicas:
        of_rank = [
            tower_and_decoder(train_flops(loaded.config.model, sample_flops(loaded.config.model, *views)))
            for views in rank.views
        ]
        towers.append(sum(t for t, _ in of_rank))
        works.append(sum(t + d for t, d in of_rank))
    assert record["vision_balance"] == pytest.approx(
        busiest(loaded.config.model, layout, replicas) / sum(towers)
    )
    assert record["work_balance"] == pytest.approx(max(works) * len(works) / sum(works))
    assert record["rows_filled"] == pytest.approx(record["text_tokens"] / TOKENS_PER_STEP)
    assert (
        record["mfu"] == pytest.approx(record["model_tflops"] * 1e12 / ranks[0].peak) and ranks[0].peak > 1e9
    )
    assert record["images"] == sum(kinds.count(GLOBAL) for kinds, _ in batches) > 0
    assert record["crops"] == sum(kinds.count(CROP) for kinds, _ in batches) > 0
    views = [sum(len(kinds) for kinds, _ in rank.views) for rank in replicas]
    assert (record["views_of_a_replica_min"], record["views_of_a_replica_max"]) == (min(views), max(views))
    assert record["text_tokens"] == sum(sum(lengths) for _, lengths in batches)
    assert record["tokens_per_second_per_gpu"] == pytest.approx(record["text_tokens"] / 0.5 / size)
    # The slowest rank decides: 0.5 s is rank 0's time, the longest wait the last rank's.
    assert record["step_seconds"] == 0.5 and record["data_wait_seconds"] == pytest.approx(0.01 * size)
    assert record["eta_seconds"] == pytest.approx((8 - 3) * 0.5)
    assert (record["loss"], record["grad_norm"], record["loss_tokens"], record["bad_samples"]) == (
        1.5,
        0.25,
        40,
        2,
    )
    assert 2**26 < record["memory_bytes"] < 2**36
    line = ranks[0].line
    for part in (
        "step 3/8", "loss 1.5000", "grad 0.25", "lr 1.00e-03", "tokens 1.23M", "tok/s/rank",
        "TFLOP/s", "MFU ", "% of GEMM", f"{record['images']} img {record['crops']} crops", "mem ", " GiB",
        f"wait {10 * size} ms", "bad 2", "eta 0m03s",
    ):  # fmt: skip
        assert part in line, line
    assert "\n" not in line


def busiest(model, layout: str, replicas) -> float:
    """Ranks with the tower, times the FLOPs that the slowest replica waits for: counted view by view."""
    sharing, waits = {"1": 1, "tp2pp2": 2, "dp2tp2": 2}[layout], []
    for rank in replicas:
        waits.append(0.0)
        for kinds, _ in rank.views:
            of_view = [tower_and_decoder(train_flops(model, sample_flops(model, [k], [])))[0] for k in kinds]
            shares = share_views(kinds, sharing, view_costs(model))
            waits[-1] += max(sum(of_view[view] for view in share) for share in shares)
    return max(waits) * sharing * len(replicas)


@pytest.fixture(scope="module")
def on_one_rank(world, data, tmp_path_factory) -> tuple[dict[int, float], list[list[str]]]:
    folder = tmp_path_factory.mktemp("one")
    (rank,) = world.run(
        1, on_ranks.pretrain, load(write_config(data, folder / "run"), "1", "train.train_steps=3")
    )
    return losses(folder / "run"), rank.samples


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("dp2", []),
        ("cp2", []),
        ("tp2pp2", ["parallel.sequence_parallel=true"]),
        ("tp2pp2", ["parallel.vision_placement=all"]),
        pytest.param(
            "tp2pp2",
            ["parallel.vision_placement=tensor", "train.micro_batch_size=1"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["dp2", "cp2", "tp2sppp2", "tp2pp2-all", "tp2pp2-tensor-micro1"],
)
def test_the_layout_changes_neither_losses_nor_samples(world, data, tmp_path, on_one_rank, layout, keys):
    """From fresh weights, through the loader and the whole loop."""
    config = write_config(data, tmp_path / "run")
    ranks = world.run(
        LAYOUTS[layout][0], on_ranks.pretrain, load(config, layout, "train.train_steps=3", *keys)
    )
    expected, samples = on_one_rank
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5) and len(expected) == 3
    replicas = ranks if layout == "dp2" else ranks[:1]
    for step, names in enumerate(samples):
        assert sorted(name for rank in replicas for name in rank.samples[step]) == sorted(names)
    assert [rank.samples for rank in ranks if layout != "dp2"] == [samples] * (
        len(ranks) if layout != "dp2" else 0
    )


def test_losses_differ_for_another_seed(world, data, tmp_path, on_one_rank):
    config = write_config(data, tmp_path / "run")
    world.run(1, on_ranks.pretrain, load(config, "1", "train.train_steps=1", "train.seed=5"))
    assert losses(tmp_path / "run")[1] != pytest.approx(on_one_rank[0][1], rel=1e-5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (1000, "1k"), (1234567, "1.23M"), (999600, "1M"),
        (53e6, "53M"), (1.2e12, "1.2T"), (7.25e14, "725T"),
    ],
)  # fmt: skip
def test_human(value, text):
    assert human(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (59.6, "1m00s"), (3599.4, "59m59s"), (3661, "1h01m01s"), (9e4, "25h00m00s")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_metrics_file_keeps_what_a_resumed_run_does_not_repeat(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write({"step": step})
    with path.open("a") as lines:
        lines.write('{"step": 6, "lo')
    MetricsFile(path, 3).write({"step": 4, "again": True})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_what_mfu_is_a_share_of(monkeypatch):
    """A listed GPU's peak; else a product that fills the device, in the format of its fast units."""

    def peak(device: str, name: str = "") -> float | tuple:
        monkeypatch.setattr(metrics, "measured_gemm_rate", lambda _, size, dtype: (size, dtype))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        return metrics.device_peak(SimpleNamespace(device=torch.device(device)))

    assert peak("cuda", "NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("cuda", "NVIDIA L40S") == (8192, torch.bfloat16)
    assert peak("cpu") == (512, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_measured(monkeypatch, dtype):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda rate: rate.mul_(4))
    runtime = SimpleNamespace(device=torch.device("cpu"), layout=Layout(dp=4))
    assert 1e6 < metrics.measured_gemm_rate(runtime, 64, dtype) < 1e13
