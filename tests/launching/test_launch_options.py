"""The command line of launch: what is refused, and what follows from the rest."""

from pathlib import Path

import pytest
from refusal import refused

from llamajax.errors import UserError
from llamajax.launch import main


def test_every_mistake_is_named_at_once(tmp_path):
    arguments = ["--processes_per_node=0", "--nodes=2", "--max_restarts=-1", "--timeout_s=0"]
    with refused(
        "--processes_per_node=0: must be at least 1",
        "--nodes=2 needs --node_rank, from 0 to 1",
        "--nodes=2 needs --coordinator=HOST:PORT",
        "--max_restarts=-1: must be at least 0",
        "--timeout_s=0.0: must be above 0",
        "no command: write it after --",
        unchanged=(tmp_path,),
    ):
        main([*arguments, f"--log_dir={tmp_path / 'logs'}"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=2", "--node_rank=2", "--coordinator=a:1"], "--node_rank=2: must be from 0"),
        (["--nodes=2", "--node_rank=0", "--coordinator=a"], "--coordinator=a: is not HOST:PORT"),
        (["--nodes=2", "--node_rank=0", "--coordinator=a:65535"], "a:65535: has no port"),
        (["--nodez=2"], r"--nodez: unknown flag; did you mean --nodes\?"),
        (["--workdir=x"], "--workdir: unknown flag$"),  # and not --log_dir
        (["--max_restarts=many"], "--max_restarts=many"),
        (["--log_dir=/dev/null/logs"], "--log_dir=/dev/null/logs: Not a directory; choose a"),
        (["--", "no-such-thing"], "no-such-thing: there is no such program"),
    ],
)
def test_values_that_make_no_sense(arguments, words):
    with pytest.raises(UserError, match=words):
        main(["--processes_per_node=1", *arguments, *([] if "--" in arguments else ["--", "true"])])


@pytest.mark.parametrize("named", ["--workdir={}", "--workdir {}"])
def test_logs_go_to_the_workdir_of_the_command(tmp_path: Path, named):
    command = ["sh", "-c", "true", *named.format(tmp_path).split()]
    assert main(["--processes_per_node=1", "--", *command]) == 0
    assert (tmp_path / "logs" / "worker_0.0.log").exists()


def test_devices_that_cannot_be_shared_are_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="cannot be shared by 2 workers"):
        main(["--processes_per_node=2", f"--log_dir={tmp_path}", "--", "true"])
