"""`llamajax VERB`: which verbs there are, and what a wrong one gets."""

import subprocess
import sys

import pytest

from llamajax import cli
from llamajax.errors import UserError


def test_unknown_verbs_name_the_nearest(monkeypatch):
    monkeypatch.setattr(cli, "verbs", lambda: {"train": "", "prepare": "", "verify_resume": ""})
    with pytest.raises(UserError, match=r"unknown verb 'trian'; did you mean train\? Verbs: train"):
        cli.dispatch(["trian", "--config=x"])
    with pytest.raises(UserError, match=r"unknown verb 'xyzzy'\. Verbs: train"):
        cli.dispatch(["xyzzy"])
    with pytest.raises(UserError, match="no verb given; one of train, prepare"):
        cli.dispatch([])


def test_a_verb_runs_as_main_with_the_rest_of_the_line(monkeypatch):
    ran = []
    monkeypatch.setattr(cli, "verbs", lambda: {"verify_resume": ""})
    monkeypatch.setattr(cli.sys, "argv", ["llamajax", "verify-resume", "--a=b", "c"])
    monkeypatch.setattr(
        cli.runpy,
        "run_module",
        lambda name, **how: ran.append((name, how["run_name"], *cli.sys.argv[1:])),
    )
    cli.dispatch(["verify-resume", "--a=b", "c"])
    assert ran == [("llamajax.verify_resume", "__main__", "--a=b", "c")]


def test_the_help_lists_what_exists(capsys):
    with pytest.raises(SystemExit) as left:
        cli.dispatch(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "llamajax VERB" in text
    for verb in cli.verbs():
        assert f"\n  {verb}" in text
    assert not {"cli", "errors", "__main__", "config"} & set(cli.verbs())


@pytest.mark.parametrize("verb", ["nonsense", *cli.verbs()])
def test_the_shell_sees_exit_code_2_and_no_traceback(verb):
    """Each verb is started the ordinary way; other mistakes are tested without a new process."""
    command = [sys.executable, "-m", "llamajax", verb, "--nonsense=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
