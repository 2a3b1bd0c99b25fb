"""What the launcher's variables say about a process, and errors that name the rank."""

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.parallel.launch import Environment, read_environment
from megatron_vl.parallel.runtime import Phase, Runtime, reported
from megatron_vl.plan.layout import Layout

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def give(**variables: object) -> Environment:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return read_environment()

    return give


def test_alone(environment):
    assert environment() == Environment(0, 1, 0)


def test_torchrun(environment):
    given = environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, MASTER_ADDR="host", MASTER_PORT=1234)
    assert given == Environment(5, 8, 1)


def test_slurm(environment):
    given = environment(
        SLURM_NTASKS=16, SLURM_PROCID=9, SLURM_LOCALID=1, MASTER_ADDR="host", MASTER_PORT=1234
    )
    assert given == Environment(9, 16, 1)


def test_torchrun_inside_a_slurm_task(environment):
    slurm = {"SLURM_NTASKS": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 0}
    given = environment(**slurm, RANK=9, WORLD_SIZE=16, LOCAL_RANK=1, MASTER_ADDR="host", MASTER_PORT=1234)
    assert given == Environment(9, 16, 1)


def test_an_allocation_of_one_task_is_one_rank(environment):
    assert environment(SLURM_NTASKS=1, SLURM_PROCID=0) == Environment(0, 1, 0)


def test_missing_variables_are_named(environment):
    with pytest.raises(ConfigError, match="RANK=3 is set but WORLD_SIZE, MASTER_PORT is not"):
        environment(RANK=3, MASTER_ADDR="host")


def test_srun_without_a_rendezvous(environment):
    with pytest.raises(ConfigError, match="under srun MASTER_ADDR and MASTER_PORT must be exported"):
        environment(SLURM_NTASKS=4, SLURM_PROCID=2)


def test_an_error_names_the_rank_by_coordinates_and_the_phase(capsys):
    layout = Layout(tp=2, pp=2, cp=2)
    runtime = Runtime(layout, 5, layout.coords(5), None, None)
    assert runtime.name == "rank 5 (dp0 pp1 cp0 tp1)" and runtime.is_last_stage and not runtime.is_first_stage
    with pytest.raises(ZeroDivisionError), reported(runtime, Phase("training", 17)):
        1 / 0  # noqa: B018
    assert (
        "rank 5 (dp0 pp1 cp0 tp1) failed while training at step 17: division by zero"
        in capsys.readouterr().err
    )


def test_an_error_of_the_user_is_left_to_the_entry(capsys):
    layout = Layout()
    runtime = Runtime(layout, 0, layout.coords(0), None, None)
    with pytest.raises(ConfigError), reported(runtime, Phase()):
        raise ConfigError("wrong")
    assert capsys.readouterr().err == ""
