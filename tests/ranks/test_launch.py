import pytest

from gptq_cli.errors import ConfigError
from gptq_cli.ranks.launch import Launch, place_of

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_what_torchrun_says() -> None:
    launch = Launch.of(TORCHRUN)
    assert launch == Launch(
        rank=5, size=8, local_rank=1, local_size=4, host="node-0", port=29500, launcher_has_store=True
    )
    assert not launch.leads
    assert launch.command == ("torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "gptq_cli")


@pytest.mark.parametrize(
    "environ", [{}, {"RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}]
)
def test_without_a_launcher_there_is_no_launch(environ: dict[str, str]) -> None:
    assert Launch.of(environ) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "8"}, "RANK=8 of WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 of LOCAL_WORLD_SIZE=4"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
    ],
)
def test_what_does_not_fit_is_an_error(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Launch.of(TORCHRUN | changes)
    assert said in caught.value.message
    assert "torchrun" in (caught.value.hint or "")


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(0, 0, 0), (1, 1, 1), (2, 2, 0), (4, 0, 1)])
def test_one_of_each_machine_says_that_the_first_is_gone(rank: int, local_rank: int, speaks: int) -> None:
    launch = Launch(rank=rank, size=8, local_rank=local_rank, local_size=4, host="a", port=1)
    assert launch.speaks_for_its_machine == bool(speaks)


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "srun --ntasks-per-node 1 torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "3"}, "mpirun --map-by ppr:1:node torchrun"),
    ],
)
def test_processes_that_do_not_know_of_each_other(environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError, match="each would do all the work") as caught:
        Launch.of(environ)
    assert line in (caught.value.hint or "")
    assert place_of(environ) == 3
    assert place_of(environ | TORCHRUN) == 5
    assert Launch.of(environ | TORCHRUN) == Launch.of(TORCHRUN), "a launcher inside is what counts"


@pytest.mark.parametrize("environ", [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_the_only_process(environ: dict[str, str]) -> None:
    assert Launch.of(environ) is None
    assert place_of(environ) == 0


def test_ranks_that_do_not_know_where_to_meet() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        Launch.of({"RANK": "1", "WORLD_SIZE": "2"})
