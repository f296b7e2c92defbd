"""What `warm` forks is a process like one that was started: id, streams, environment, end."""

import json
import os
import signal
import subprocess
import sys

import warm

TELL = """
import json, os, sys, threading
told = [sys.argv, os.getcwd(), os.environ.get("WORD"), sys.stdin.read()]
told += [os.getpid() == os.getpgid(0), threading.active_count()]
told += [sorted(map(int, os.listdir("/proc/self/fd")))[:5]]
print(json.dumps(told))
print("said", file=sys.stderr)
sys.exit(7)
"""


def test_it_has_arguments_a_directory_an_environment_streams_and_a_code(tmp_path):
    done = warm.run(
        [sys.executable, "-c", TELL, "a b"], cwd=tmp_path, env=os.environ | {"WORD": "x"},
        input="in", capture_output=True, text=True, process_group=0,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "said\n")
    told = [["-c", "a b"], str(tmp_path), "x", "in", True, 1]
    assert json.loads(done.stdout) == [*told, [0, 1, 2, 3]]  # 3 lists the others


def test_it_is_forked_with_jax_and_without_a_backend():
    code = (
        "import sys; from jax._src import xla_bridge as x\n"
        "print('orbax.checkpoint' in sys.modules, x.backends_are_initialized())\n"
        "import jax; print(jax.device_count(), jax.config.jax_platforms)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}
    done = warm.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True False\n3 cpu\n", "")


def test_a_signal_ends_it_and_an_error_is_python_s_own():
    code = "print('up', flush=True); import signal; signal.pause()"
    with warm.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    done = warm.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_verb_is_the_main_module_and_mistakes_are_2():
    command = [sys.executable, "-m", "llamajax.train", "--confg=x"]
    forked, started = (
        run(command, capture_output=True, text=True) for run in (warm.run, subprocess.run)
    )
    assert forked.returncode == started.returncode == 2
    assert forked.stderr == started.stderr
    assert (forked.stdout, started.stdout) == ("", "")
