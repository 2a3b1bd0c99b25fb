"""What `pretrain` refuses before it starts a single process."""

from pathlib import Path

import pytest

from megatron_vl.__main__ import main
from megatron_vl.parallel import launch
from megatron_vl.train import pretrain
from tests.train.tiny_run import make_files, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    return write_config(make_files(folder), folder / "run")


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    def started(*args):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(pretrain, "run_local", started)
    monkeypatch.setattr(pretrain, "train_on_rank", started)
    monkeypatch.setattr(launch.subprocess, "Popen", started)
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        (["parallel.tensor_model_parallel_size=3"], 3, ["tensor_model_parallel_size = 3"]),
        (["parallel.pipeline_model_parallel_size=2"], 3, ["must be a multiple of TP1 x CP1 x PP2"]),
        (["train.global_batch_size=7"], 2, ["train.global_batch_size = 7: must be a multiple of"]),
        (
            [
                "parallel.context_parallel_size=2", "data.seq_length=63", "data.train=[nowhere.jsonl]",
                "data.sead=3",
            ],
            2,
            [
                "3 problems", "data.seq_length = 63: must be a multiple of 2 x context_parallel_size 2",
                "data.train = nowhere.jsonl: no such file", "data.sead", "did you mean data.seed?",
            ],
        ),
        (
            [
                "data.tokenizer=gone.model", "data.data_root=/no/where", "train.init_from_hf=/none",
                "schedule.phases=[]",
            ],
            1,
            [
                "4 problems", "data.tokenizer = gone.model: no such file",
                "data.data_root = /no/where: no such folder",
                "train.init_from_hf = /none: no such folder", "schedule.phases",
            ],
        ),
    ],
    ids=["tp3", "world", "batch", "three", "four"],
)  # fmt: skip
def test_every_problem_is_listed_and_nothing_starts(config, capsys, overrides, ranks, expected):
    assert main(["pretrain", str(config), *overrides, "--nproc", str(ranks)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for text in expected:
        assert text in printed.err
    assert not config.with_suffix("").exists(), "the run folder was made"


def test_a_missing_config_file(tmp_path, capsys):
    assert main(["pretrain", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_ranks_of_a_launcher_check_against_its_world_size(config, capsys, monkeypatch):
    """Under torchrun and srun, not --nproc but the launcher says how many ranks there are."""
    key = "parallel.tensor_model_parallel_size=2"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["pretrain", str(config), key]) == 2
    assert "world size = 3" in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "5")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(["pretrain", str(config), key]) == 2
    assert "world size = 5" in capsys.readouterr().err
    # A shell inside an allocation, without srun: this process is no rank of it.
    monkeypatch.delenv("SLURM_PROCID")
    assert main(["pretrain", str(config), key]) == 2
    assert "world size = 1" in capsys.readouterr().err
