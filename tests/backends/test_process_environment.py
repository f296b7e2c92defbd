"""Which process this is, and what a launcher gives its workers: rank, devices, pipes."""

import contextlib
import os
import subprocess
import sys
import types

import pytest

from llamajax.backends import process_environment
from llamajax.backends.process_environment import (
    Rank,
    child_environment,
    detected_scheduler,
    find_rank,
    first_host,
)
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
    """Sets the variables of this process to exactly these."""

    def put(values: dict[str, str]) -> None:
        monkeypatch.setattr(process_environment.os, "environ", values)

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


def test_one_process_of_a_launcher_or_of_a_shell_of_salloc(environment):
    environment(SLURM | {"LLAMAJAX_NUM_PROCESSES": "1", "LLAMAJAX_COORDINATOR": "a:1"})
    assert find_rank(BackendConfig()).num_processes == 1
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
        ({"LLAMAJAX_COORDINATOR": ""}, "all three or none"),
        ({"LLAMAJAX_COORDINATOR": "a"}, "LLAMAJAX_COORDINATOR=a: is not HOST:PORT"),
        ({"LLAMAJAX_COORDINATOR": "::1:88"}, r"brackets: \[::1\]:88"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x: is not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)"}, r"SLURM_STEP_NUM_TASKS=2\(x2\): is not a number"),
        ({"SLURM_PROCID": "4"}, "SLURM_PROCID=4: must be below SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_LOCALID": "-1"}, "SLURM_LOCALID=-1: is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE=x: is not a number; for a process"),
    ],
)
def test_variables_that_make_no_sense_are_refused(environment, changes, words):
    environment((LAUNCHED if min(changes).startswith("LLAMAJAX") else SLURM) | changes)
    with pytest.raises(UserError, match=words):
        assert find_rank(BackendConfig()) is None or detected_scheduler()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[01-03],m", "n01"), ("r[1,4-5]-b,c", "r1-b"), ("a-1,b", "a-1")],
)
def test_slurms_lists_of_hosts(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("variables", "scheduler"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod, not an indexed job's
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": ""}, None),
    ],
)
def test_schedulers_that_jax_asks_itself(environment, variables, scheduler):
    environment(variables)
    assert detected_scheduler() == scheduler


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


def test_a_pod_that_cannot_ask_for_others_is_alone_if_it_is_the_first(environment, capsys):
    environment(POD)
    assert detected_scheduler() is None
    assert "warning: JOB_COMPLETION_INDEX=0: without the package" in capsys.readouterr().err
    environment(POD | {"JOB_COMPLETION_INDEX": "3"})
    with pytest.raises(UserError, match=r"cannot be found: .* set LLAMAJAX_NUM_PROCESSES=1"):
        detected_scheduler()


def test_the_cluster_says_how_many_pods_a_job_has(environment, monkeypatch, tmp_path):
    """With a stand-in of the package kubernetes: no cluster was at hand."""
    refused = type("ApiException", (Exception,), {})
    pods = {"train": 1, "pair": 2}

    def read_namespaced_job(*, name: str, namespace: str) -> types.SimpleNamespace:
        if name not in pods:
            raise refused("(403)\nReason: Forbidden")
        assert namespace == "research"
        return types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=pods[name]))

    api = types.SimpleNamespace(read_namespaced_job=read_namespaced_job)
    kubernetes = types.SimpleNamespace(
        config=types.SimpleNamespace(load_incluster_config=lambda: None, ConfigException=refused),
        client=types.SimpleNamespace(BatchV1Api=lambda: api, ApiException=refused),
    )
    urllib3 = types.SimpleNamespace(exceptions=types.SimpleNamespace(HTTPError=refused))
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    monkeypatch.setitem(sys.modules, "urllib3", urllib3)
    (tmp_path / "namespace").write_text("research\n")
    monkeypatch.setattr(process_environment, "_NAMESPACE", tmp_path / "namespace")
    environment(POD)
    for host, scheduler in (("train-0", None), ("pair-1", "Kubernetes")):
        monkeypatch.setattr(process_environment.socket, "gethostname", lambda host=host: host)
        assert detected_scheduler() == scheduler
    monkeypatch.setattr(process_environment.socket, "gethostname", lambda: "other-0")
    with pytest.raises(UserError, match=r"how many pods the job has \(\(403\)\): let"):
        detected_scheduler()


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):  # closed by the test
            os.close(descriptor)


@pytest.fixture
def worker_environment(environment, pipe):
    """The environment of one of several workers under some variables."""

    def make(local: tuple[int, int] = (0, 1), **variables: str) -> dict[str, str]:
        environment(variables)
        return child_environment(
            coordinator_address="a:1",
            num_processes=16,
            process_id=9,
            local=local,
            parent_pipe=pipe[0],
            checkpoints=pipe[1],
        )

    return make


def test_a_worker_is_told_its_rank(worker_environment):
    variables = {"HOME": "/h", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    found = worker_environment((1, 8), **variables)
    assert found["LLAMAJAX_COORDINATOR"] == "a:1"
    assert (found["LLAMAJAX_NUM_PROCESSES"], found["LLAMAJAX_PROCESS_ID"]) == ("16", "9")
    assert found["HOME"] == "/h"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1,2"  # nobody computes on them


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"])
def test_devices_are_shared_by_local_number(worker_environment, name):
    found = [worker_environment((i, 2), **{name: "4,5,6,7"})[name] for i in range(2)]
    assert found == ["4,5", "6,7"]
    assert worker_environment((0, 1), **{name: "4,5,6,7"})[name] == "4,5,6,7"


def test_devices_of_the_node_are_counted(worker_environment, monkeypatch):
    nodes = ["/dev/nvidia0", "/dev/nvidia1"]
    monkeypatch.setattr(
        process_environment.glob, "glob", lambda text: nodes if "nvidia" in text else []
    )
    found = worker_environment((1, 2))
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert "ASCEND_RT_VISIBLE_DEVICES" not in found


def test_devices_that_cannot_be_shared_are_refused(worker_environment):
    with pytest.raises(UserError, match=r"3 devices .* cannot be shared by 2 workers"):
        worker_environment((0, 2), CUDA_VISIBLE_DEVICES="0,1,2")


def test_a_worker_ends_with_its_launcher(worker_environment, pipe, monkeypatch):
    reading, writing = pipe
    code = "from llamajax import backends; backends.exit_with_launcher(); print('x', flush=True);"
    code += "import signal; signal.pause()"
    environment = worker_environment(**os.environ)
    monkeypatch.undo()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        pass_fds=(reading,),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"x\n"
        assert process.poll() is None
        os.close(writing)
        assert b"the launcher is gone" in process.communicate(timeout=60)[1]
        assert process.returncode == 1


def test_checkpoints_are_reported_and_never_waited_for(worker_environment, pipe, environment):
    reading, writing = pipe
    os.set_blocking(writing, False)
    environment(worker_environment())
    process_environment.report_checkpoint(7)
    assert os.read(reading, 100) == b"7\n"
    os.write(writing, b"1\n" * (1 << 20))  # as much as the pipe takes
    process_environment.report_checkpoint(8)
    environment({})
    process_environment.report_checkpoint(9)  # no launcher


def test_a_process_without_the_pipe_goes_on(pipe, environment):
    """The variable is inherited further than the pipe; the number may be another file's then."""
    for value in (f"{pipe[0]}:1", "999:1", "x", ""):
        environment({"LLAMAJAX_PARENT_PIPE": value})
        process_environment.exit_with_launcher()
    threads = process_environment.threading.enumerate()
    assert not any(thread.name == "exit_with_launcher" for thread in threads)
