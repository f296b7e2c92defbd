"""`llamajax VERB`: which verbs there are, and what a wrong one gets."""

import subprocess
import sys
from pathlib import Path

import pytest

from llamajax import cli
from llamajax.errors import UserError


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "--config=x"], r"unknown verb 'trian'; did you mean train\? Verbs: train"),
        (["xyzzy"], r"unknown verb 'xyzzy'\. Verbs: train"),
        ([], "no verb given; one of train, prepare"),
    ],
)
def test_unknown_verbs_name_the_nearest(monkeypatch, argv, message):
    monkeypatch.setattr(cli, "verbs", lambda: {"train": "", "prepare": "", "verify_resume": ""})
    with pytest.raises(UserError, match=message):
        cli.dispatch(argv)


def test_a_verb_runs_as_main_with_the_rest_of_the_line(monkeypatch):
    ran = []
    monkeypatch.setattr(cli.sys, "argv", ["llamajax", "verify-resume", "--a=b", "c"])
    monkeypatch.setattr(
        cli.runpy, "run_module", lambda name, **how: ran.append((name, how["run_name"]))
    )
    cli.dispatch(["verify-resume", "--a=b", "c"])
    assert ran == [("llamajax.verify_resume", "__main__")]
    assert cli.sys.argv[1:] == ["--a=b", "c"]


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_help_lists_what_exists(capsys, word):
    with pytest.raises(SystemExit, match="0"):
        cli.dispatch([word])
    text = capsys.readouterr().out
    assert all(f"\n  {verb}" in text for verb in ("train", "prepare", "launch", *cli.verbs()))
    assert not {"cli", "errors", "files", "__main__", "config"} & set(cli.verbs())


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("configs", "quickstart            A small Llama on the bundled book, from nothing"),
        ("presets", "llama2-7b       6,738,415,616     32    4096     32/32      32,000    4,096"),
    ],
)
def test_what_there_is_is_listed(capsys, word, line):
    for asked in ([word], [word, "--help"]):
        cli.dispatch(asked)
        assert f"\n{line}" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"llamajax {word} takes no arguments: leave out more"):
        cli.dispatch([word, "more"])


@pytest.mark.parametrize("verb", ["nonsense", *cli.verbs()])
def test_the_shell_sees_exit_code_2_and_no_traceback(verb):
    """Each verb is started the ordinary way; other mistakes are tested without a new process."""
    command = [sys.executable, "-m", "llamajax", verb, "--nonsense=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: " in done.stderr
    assert verb == "nonsense" or "--nonsense: unknown flag" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_begins_with_an_example_and_ends_by_run_verb(verb):
    source = (Path(cli.__file__).parent / f"{verb}.py").read_text()
    assert f"\n\nExample:\n  python -m llamajax.{verb}" in source.split('"""')[1]
    assert source.endswith("    run_verb(main)\n")
