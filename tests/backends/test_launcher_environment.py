"""What a launcher gives its workers: their place, their devices, and an end when it ends."""

import os
import subprocess
import sys

import pytest

from llamajax.backends import child_environment
from llamajax.backends import launcher_environment as children
from llamajax.errors import UserError


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:
            continue  # closed by the test


@pytest.fixture
def environment_of(monkeypatch, pipe):
    """The environment of one of several workers under some variables."""

    def make(local: tuple[int, int], **variables: str) -> dict[str, str]:
        monkeypatch.setattr(children.os, "environ", variables)
        return child_environment(
            coordinator_address="a:1",
            num_processes=16,
            process_id=9,
            local=local,
            parent_pipe=pipe[0],
        )

    return make


def test_the_place_is_told(environment_of):
    found = environment_of((1, 8), HOME="/h", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="0,1,2")
    assert found["LLAMAJAX_COORDINATOR"] == "a:1"
    assert (found["LLAMAJAX_NUM_PROCESSES"], found["LLAMAJAX_PROCESS_ID"]) == ("16", "9")
    assert found["HOME"] == "/h"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1,2"  # nobody computes on them


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"])
def test_devices_are_shared_by_local_number(environment_of, name):
    found = [environment_of((i, 2), **{name: "4,5,6,7"})[name] for i in range(2)]
    assert found == ["4,5", "6,7"]
    assert environment_of((0, 1), **{name: "4,5,6,7"})[name] == "4,5,6,7"


def test_devices_of_the_node_are_counted(environment_of, monkeypatch):
    nodes = ["/dev/nvidia0", "/dev/nvidia1"]
    monkeypatch.setattr(children.glob, "glob", lambda text: nodes if "nvidia" in text else [])
    assert environment_of((1, 2))["CUDA_VISIBLE_DEVICES"] == "1"
    assert "ASCEND_RT_VISIBLE_DEVICES" not in environment_of((1, 2))


def test_devices_that_cannot_be_shared_are_refused(environment_of):
    with pytest.raises(UserError, match=r"3 devices .* cannot be shared by 2 workers"):
        environment_of((0, 2), CUDA_VISIBLE_DEVICES="0,1,2")


def test_a_worker_ends_with_its_launcher(pipe):
    reading, writing = pipe
    code = "from llamajax import backends; backends.exit_with_launcher(); print('x', flush=True);"
    code += "import signal; signal.pause()"
    environment = child_environment(
        coordinator_address="a:1", num_processes=1, process_id=0, local=(0, 1), parent_pipe=reading
    )
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


def test_checkpoints_are_reported_and_never_waited_for(pipe, monkeypatch):
    reading, writing = pipe
    os.set_blocking(writing, False)
    environment = child_environment(
        coordinator_address="a:1",
        num_processes=1,
        process_id=0,
        local=(0, 1),
        parent_pipe=reading,
        checkpoints=writing,
    )
    monkeypatch.setenv("LLAMAJAX_CHECKPOINTS", environment["LLAMAJAX_CHECKPOINTS"])
    children.report_checkpoint(7)
    assert os.read(reading, 100) == b"7\n"
    os.write(writing, b"1\n" * (1 << 20))  # as much as the pipe takes
    children.report_checkpoint(8)
    monkeypatch.setenv("LLAMAJAX_CHECKPOINTS", "")
    children.report_checkpoint(9)  # no launcher


def test_a_process_without_the_pipe_does_not_follow(pipe, monkeypatch):
    """The variable is inherited further than the pipe; the number may be another file's then."""
    for value in (f"{pipe[0]}:1", "999:1", "x", ""):
        monkeypatch.setenv("LLAMAJAX_PARENT_PIPE", value)
        children.exit_with_launcher()
    assert not any(t.name == "exit_with_launcher" for t in children.threading.enumerate())
