"""`python -m megatron_vl plan` and `tools/plan_parallelism.py`: what they print, refuse and return."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vl.__main__ import main
from megatron_vl.bench.measured import main as tool
from megatron_vl.errors import ConfigError
from megatron_vl.plan.checks import load_checked_run

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/pretrain/step3_vl_10b.yaml")


def search_main(options) -> int:
    return tool(options, [])


def test_one_layout(capsys):
    assert main(["plan", EXAMPLE, "--gpus", "512"]) == 0
    out = capsys.readouterr().out
    assert "Layout: TP4 CP1 DP128 PP1 SP, vision placement data; micro-batches 64 x 1 rows" in out
    assert "recompute decoder selective, vision full" in out
    assert "Fits in 79.0 GiB." in out and "pp0" in out and "optimizer" in out
    assert main(["plan", EXAMPLE, "--gpus", "512", "--figure"]) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith(out) and "one letter is 1.3 GiB" in drawn.removeprefix(out)


def test_one_that_does_not_fit(capsys):
    assert main(["plan", EXAMPLE, "--gpus", "4", "recompute.vision=none", "--memory", "40"]) == 1
    assert "Does not fit: pp0 needs" in capsys.readouterr().out


def test_the_fewest_ranks_are_taken(capsys):
    assert main(["plan", EXAMPLE, "--memory", "60"]) == 1  # the optimizer is shared by one rank only
    assert capsys.readouterr().out.startswith("4 x H100")


def test_a_layout_that_is_not_legal(capsys):
    assert main(["plan", EXAMPLE, "--gpus", "6"]) == 2
    assert "world size = 6: must be a multiple of TP4" in capsys.readouterr().err
    assert main(["plan"]) == 2


def test_the_table(capsys):
    assert search_main([EXAMPLE, "--gpus", "8", "--top", "3", "--visual-share", "0", "--figure"]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out and "0 visual tokens" in out
    rows = [line.split() for line in out.splitlines() if line.endswith("pp0")]
    assert len(rows) == 3 and "W weights, G gradients" in out
    assert "  tensor_model_parallel_size: " in out and "micro_batch_size: " in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([EXAMPLE], "--gpus: no number"),
        ([EXAMPLE, "--gpus", "0"], "--gpus 0"),
        ([EXAMPLE, "--gpus", "8", "--visual-share", "1.5"], "--visual-share 1.5"),
        ([EXAMPLE, "--gpus", "8", "--document-tokens", "0"], "--document-tokens 0"),
        ([EXAMPLE, "--gpus", "8", "--memory", "0"], "--memory 0"),
        ([EXAMPLE, "--gpus", "8", "--memory", "1e-12"], "--memory 1e-12"),
        ([EXAMPLE, "--gpus", "8", "--memory", "nan"], "--memory nan"),
        ([EXAMPLE, "--gpus", "8", "--memory", "inf"], "--memory inf"),
        ([EXAMPLE, "--gpus", "8", "--top", "0"], "--top 0"),
        ([EXAMPLE, "--gpus", "8", "--top", "-3"], "--top -3"),
        (
            [EXAMPLE, "--gpus", "8", "data.seq_length=512", "train.global_batch_size=64"],
            "the plan's images are 655 tokens a row",
        ),
        (
            [
                EXAMPLE,
                "--gpus",
                "8",
                "parallel.overlap_param_gather=true",
                "parallel.use_distributed_optimizer=false",
            ],
            "parallel.overlap_param_gather = true",
        ),
        ([EXAMPLE, "--gpus", "8", "precision.fp8_vision=true"], "precision.fp8_vision = true"),
        (
            [EXAMPLE, "--gpus", "8", "--gpu", "CPU", "parallel.layer_backend=transformer_engine"],
            "CPU: parallel.layer_backend = transformer_engine",
        ),
        (
            [EXAMPLE, "--gpus", "8", "--gpu", "CPU", "parallel.cp_comm_type=a2a"],
            "CPU: parallel.cp_comm_type = a2a",
        ),
        (
            [EXAMPLE, "--gpus", "8", "--gpu", "CPU", "parallel.flash_attention=fa3"],
            "CPU: parallel.flash_attention = fa3",
        ),
        (["--gpus", "8"], "no run is given"),
    ],
)
def test_mistakes(options, told):
    with pytest.raises(ConfigError, match=told):
        search_main(options)


def test_the_block_takes_the_place_of_what_a_file_says(tmp_path, capsys):
    """A run with stages of its own, with the printed block laid over it, has the layout of the first row."""
    assert search_main([EXAMPLE, "--gpus", "8", "--top", "1"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out.rpartition("# the first row")[2].partition("\n")[2])
    stages = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_decoder_layers": [0, 12, 12, 12],
    }
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {**yaml.safe_load(Path(EXAMPLE).read_text()), **printed, "parallel": stages | printed["parallel"]}
        )
    )
    config = load_checked_run(str(file), world_size=8).config
    assert config.parallel.pipeline_model_parallel_size == 1
    assert config.parallel.chunks_per_stage == 1 and config.parallel.pipeline_decoder_layers is None


def test_the_tool_ends_with_a_message_and_code_2():
    command = [sys.executable, str(ROOT / "tools/plan_parallelism.py"), EXAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--gpus" in done.stderr and "Traceback" not in done.stderr
