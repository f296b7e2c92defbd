"""Which process this is, from the config, a launcher's variables, or SLURM's."""

import pytest

from llamajax.backends import rank as module
from llamajax.backends.rank import Rank, detected_scheduler, find_rank, first_host
from llamajax.config.schema import BackendConfig
from llamajax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NODELIST": "node[07-08,11]",
}
LAUNCHED = {
    "LLAMAJAX_COORDINATOR": "a:1",
    "LLAMAJAX_NUM_PROCESSES": "2",
    "LLAMAJAX_PROCESS_ID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of processes to exactly these."""

    def put(values: dict[str, str]) -> None:
        monkeypatch.setattr(module.os, "environ", values)

    put({})
    return put


def test_nothing_says_nothing(environment):
    assert find_rank(BackendConfig()) is None
    assert detected_scheduler() is None


def test_the_config_comes_before_the_launcher_and_that_before_slurm(environment):
    environment(LAUNCHED | SLURM)
    launched = Rank(coordinator_address="a:1", num_processes=2, process_id=1)
    assert find_rank(BackendConfig()) == launched
    config = BackendConfig(coordinator_address="b:2", num_processes=8, process_id=7)
    assert find_rank(config) == Rank(coordinator_address="b:2", num_processes=8, process_id=7)
    environment(SLURM)
    found = find_rank(BackendConfig())
    assert (found.coordinator_address, found.process_id) == (f"node07:{61440 + 70001 % 4096}", 2)


def test_a_launcher_of_one_process_overrides_a_scheduler(environment):
    environment(SLURM | {"LLAMAJAX_NUM_PROCESSES": "1", "LLAMAJAX_COORDINATOR": "a:1"})
    assert find_rank(BackendConfig()).num_processes == 1


def test_a_shell_of_salloc_is_one_process(environment):
    environment(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"})
    assert find_rank(BackendConfig()) is None


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}, None),
    ],
)
def test_tasks_on_one_node_take_a_gpu_each_unless_bound(environment, more, devices):
    environment(SLURM | more)
    assert find_rank(BackendConfig()).local_device_ids == devices


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LLAMAJAX_PROCESS_ID": "2"}, "LLAMAJAX_PROCESS_ID=2: must be below"),
        ({"LLAMAJAX_PROCESS_ID": "x"}, "all three or none"),
        ({"LLAMAJAX_COORDINATOR": "a"}, "all three or none"),
    ],
)
def test_variables_without_sense_are_refused(environment, changes, words):
    environment(LAUNCHED | changes)
    with pytest.raises(UserError, match=words):
        find_rank(BackendConfig())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[01-03],m", "n01"), ("r[1,4-5]-b,c", "r1-b"), ("a-1,b", "a-1")],
)
def test_slurms_lists_of_hosts(nodes, first):
    assert first_host(nodes) == first


def test_schedulers_that_jax_asks_itself(environment):
    environment({"OMPI_COMM_WORLD_SIZE": "2"})
    assert detected_scheduler() == "Open MPI"
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # any pod, not an indexed job's
    assert detected_scheduler() is None
    environment({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    assert detected_scheduler() == "Kubernetes"
