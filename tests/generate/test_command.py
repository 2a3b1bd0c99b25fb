"""``python -m megatron_vl generate``: a tiny release answers, in any layout."""

import subprocess
import sys

import pytest
import yaml
from PIL import Image

from megatron_vl.__main__ import main
from tests.generate.command_on_ranks import command_on_rank
from tests.tiny_release import write_release
from tests.train.tiny_run import make_files, write_config


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(configuration file, image) of a release with tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    write_release(folder / "release")
    Image.linear_gradient("L").resize((160, 60)).convert("RGB").save(folder / "wide.png")
    description = {
        "model_from": str(folder / "release"),
        "run_dir": str(folder / "run"),
        "parallel": {"device": "cpu"},
        "data": {"tokenizer": str(folder / "release" / "tokenizer.json")},
        "train": {"init_from_hf": str(folder / "release")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(description))
    return str(folder / "run.yaml"), str(folder / "wide.png")


def asked(release, *more: str) -> list[str]:
    config, image = release
    return [config, "--image", image, "--prompt", "What is this?", "--max-tokens", "12", "--seed", "3", *more]


def test_a_release_answers_alike_in_every_layout(world, release):
    ((out, err),) = world.run(1, command_on_rank, asked(release), 1)
    assert out.endswith("\n") and len(out) > 6
    assert "weights: " in err and "12 tokens in" in err and "ended by: length" in err
    split = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    answers = world.run(4, command_on_rank, asked(release, *split), 4)
    assert [answer[0] for answer in answers] == [out, "", "", ""]
    assert answers[0][1].split("weights")[-1] == err.split("weights")[-1]  # the version


def test_several_responses_count_the_seed_up(world, release):
    ((out, err),) = world.run(1, command_on_rank, asked(release, "--n", "3"), 1)
    ((second, _),) = world.run(1, command_on_rank, [*asked(release), "--seed", "4"], 1)
    assert "--- response 2, seed 4" in err and "--- response 3, seed 5" in err
    assert second in out and "36 tokens" in err


def test_weights_must_come_from_somewhere(world, release):
    ((_, err),) = world.run(1, command_on_rank, asked(release, "train.init_from_hf=none"), 1)
    assert "it has no checkpoint, and neither" in err and "give --checkpoint DIR" in err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--image", "gone.png"], "--image gone.png: no such file"),
        (["--top-p", "0"], "top_p = 0.0: must be above 0"),
        (["--max-tokens", "0"], "max_tokens = 0: must be at least 1"),
        (["--n", "0"], "--n 0: must be at least 1"),
        (["data.tokenizer="], "data.tokenizer: no tokenizer"),
        (
            ["parallel.device=auto", "parallel.layer_backend=transformer_engine"],
            "set parallel.layer_backend=torch",
        ),
        (["parallel.tensor_model_parallel_size=2"], "world size = 1: must be a multiple of TP2"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(release, capsys, changes, told):
    assert main(["generate", *asked(release, *changes)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_run_answers_from_its_newest_checkpoint(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    config = write_config(make_files(data), tmp_path / "run", train_steps=2)
    command = [sys.executable, "-m", "megatron_vl"]
    subprocess.run([*command, "pretrain", str(config)], check=True, capture_output=True, text=True)
    ask = ["--image", str(data / "small_red.jpg"), "--prompt", "What colour?", "--max-tokens", "5"]
    said = []
    for more in (
        ["--nproc", "2", "parallel.tensor_model_parallel_size=2"],
        ["--checkpoint", str(tmp_path / "run")],
    ):
        done = subprocess.run(
            [*command, "generate", str(config), *ask, *more], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        assert "tokens in" in done.stderr and "run" in done.stderr.split("weights: ")[1].splitlines()[0]
    assert said[0] == said[1]
