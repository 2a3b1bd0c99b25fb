"""`python -m megatron_vl config`: what it prints, what it refuses, how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vl.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/pretrain/step3_vl_10b.yaml")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["config", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_example_of_the_release(capsys):
    status, out, err = run(capsys, EXAMPLE)
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for expected in (
        "total 10,171,750,144",
        "47 vision blocks 1,738,443,520",
        "tower without downsamplers 1,743,503,104",
        "decoder 8,190,735,360",
        f"tensor_model_parallel_size 4 file {EXAMPLE}",
        "num_layers 36 preset step3_vl_10b",
        "timeout_seconds 600 default",
        f"phases[0] 900,000,000,000 tokens, 5e-05 -> 1e-05, cosine file {EXAMPLE}",
        "run: 35,763 steps, 1,200,000,000,000 tokens",
        "dp0 pp0 [0 1 2 3]",
        "one 728 px global view, 2,704 patches 11.63 TFLOP 34.90 TFLOP",
    ):
        assert expected in lines, expected
    assert any(line.startswith("pp0 layers 0-35 (36) + tower + embedding + head") for line in lines)


def test_overrides_stages_and_world_size(capsys):
    pipeline = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    status, out, _ = run(capsys, EXAMPLE, *pipeline, "--world-size", "16", "model.freeze_vision=true")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 0
    assert "pipeline_model_parallel_size 2 command line" in lines
    assert "Layout of 16 ranks: TP4 CP1 DP2 PP2 VPP2 SP, vision placement data" in lines
    assert "dp1 pp1 [12 13 14 15]" in lines
    assert "pp0 vp1 layers 18-26 (9)" in lines
    assert "pp1 vp1 layers 27-35 (9) + head" in lines
    assert "trained 8,215,901,184 (frozen: vision)" in lines


def test_a_large_grid_is_cut(capsys):
    _, out, _ = run(capsys, EXAMPLE, "--world-size", "512")
    assert "... 112 more lines, up to rank 511" in out


def test_hf_folder(capsys, tmp_path):
    config = {
        "patch_token_len": 1,
        "vision_config": {"image_size": 112, "width": 64, "layers": 3, "heads": 4, "mlp_ratio": 2.75},
        "text_config": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = run(capsys, "--hf", str(tmp_path), "train.seed=3")
    assert status == 0
    # 760,336 with the vocabulary of 512 rows of the golden checkpoint
    assert f"{760_336 + 2 * 64 * (151_936 - 512):,}" in out
    assert f"file {tmp_path / 'config.json'}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "config: no run is given; give a YAML file or --hf DIR"),
        (("none.yaml",), "none.yaml: cannot be read"),
        ((EXAMPLE, "train.sede=1"), "train.sede: unknown key; did you mean train.seed?"),
        (
            (EXAMPLE, "--world-size", "6"),
            "world size = 6: must be a multiple of TP4 x CP1 x PP1 = 4; start 4 or 8 ranks",
        ),
        (
            (EXAMPLE, "--world-size", "0"),
            "world size = 0: must be a multiple of TP4 x CP1 x PP1 = 4; start 4 ranks",
        ),
        (("--hf", "/nowhere"), "/nowhere/config.json: cannot be read"),
        (("--hf", "/nowhere", EXAMPLE), "preset = step3_vl_10b: stands beside model_from = /nowhere"),
    ],
)
def test_refused(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_unknown_command_and_help(capsys):
    assert main(["confg"]) == 2
    assert "unknown command 'confg'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_bad_options_end_with_two(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["config", EXAMPLE, "--world-size", "many"])
    assert caught.value.code == 2


def test_a_closed_pipe_is_quiet_and_torch_stays_out():
    code = (
        "import sys, megatron_vl.__main__ as m; s = m.main(sys.argv[1:]); exit(s or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "config", EXAMPLE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_the_module_runs(tmp_path):
    command = [sys.executable, "-m", "megatron_vl", "config", EXAMPLE, "train.sede=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("1 problem in the configuration:\n  train.sede: unknown key")
