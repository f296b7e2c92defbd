"""The command line: spellings, and every mistake of it and of the config in one message."""

import subprocess
import sys

import pytest

from llamajax.config import BACKEND_FLAGS, WORKDIR, Flag, help_text, parse_command_line
from llamajax.config.keys import all_keys, sections
from llamajax.errors import UserError

SEARCH = Flag(name="search", doc="rank the choices", annotation=bool, default=False)
COUNT = Flag(name="count", doc="how many", annotation=int, default=3)


def parse(*argv: str, flags=(WORKDIR, SEARCH, COUNT), **options):
    return parse_command_line(argv, verb="train", flags=flags, **options)


def problems_of(*argv: str, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(*argv, **options)
    title, *problems = str(caught.value).splitlines()
    assert "python -m llamajax.train --help" in title
    return [line.removeprefix("  - ") for line in problems]


def test_all_spellings_of_a_flag(config_file):
    path = config_file()
    for argv in (
        [f"--config={path}", "--workdir=out", "--config.train.steps=20", "--config.mesh.fsdp=-1"],
        ["--config", path, "--workdir", "out", "--config.train.steps", "2e1", "--config.mesh.fsdp",
         "-1"],
        ["--config.train.steps=9", f"--config={path}", "--config.mesh.fsdp=-1", "--workdir=out",
         "--config.train.steps=20"],
    ):  # fmt: skip
        found = parse(*argv)
        assert (found.config_file, found.workdir, found.search, found.count) == (
            path,
            "out",
            False,
            3,
        )
        assert (found.config.train.steps, found.config.mesh.fsdp) == (20, -1)


def test_switches_stand_alone_or_take_a_value(config_file):
    head = (f"--config={config_file()}", "--workdir=out")
    assert parse(*head, "--search", "--count=4").search is True
    assert parse(*head, "--search", "false").search is False
    assert parse(*head, "--search=false").search is False
    found = parse(*head, "--config.data.shuffle", "false", "--config.checkpoint.asynchronous")
    assert (found.config.data.shuffle, found.config.checkpoint.asynchronous) == (False, True)


def test_a_value_may_hold_an_equals_sign(config_file):
    head = (f"--config={config_file()}", "--workdir=a=b", "--config.backend.name=npu")
    found = parse(*head, "--config.backend.options=k=v,l=w")
    assert (found.workdir, found.config.backend.options) == ("a=b", "k=v,l=w")


def test_every_mistake_of_flags_and_config_is_named_at_once(config_file):
    found = "\n".join(
        problems_of(
            f"--config={config_file('config.optim.beta3 = 1')}",
            "--wrokdir=out",
            "stray",
            "--steps=3",
            "--train.steps=3",
            "-x",
            "--count=many",
            "--config.train.stepz=3",
            "--config.train.seed=x",
            "--config.data=x",
            "--config.train.log_every",
        )
    )
    for fragment in (
        "--wrokdir: unknown flag; did you mean --workdir?",
        "stray argument 'stray'",
        "--steps: unknown flag; did you mean --config.train.steps?",
        "--train.steps: unknown flag; did you mean --config.train.steps?",
        "-x: unknown flag",
        "--workdir=DIR is required",
        "--count=many: expected int, got 'many'",
        "--config.train.stepz: unknown key; did you mean --config.train.steps?",
        "--config.train.seed=x: expected int, got 'x'",
        "--config.data: names a section; set one of its keys, e.g. --config.data.path",
        "--config.train.log_every: has no value; write --config.train.log_every=VALUE",
        "optim.beta3: unknown key; did you mean optim.beta2?",
    ):
        assert fragment in found
    assert len(found.splitlines()) == 12


def test_required_flags_are_named():
    found = problems_of()
    assert found[0].startswith("--config=FILE.py[:ARG] is required")
    assert found[1].startswith("--workdir=DIR is required: directory of the run")
    assert problems_of("--workdir=", "--config=")[1].startswith("--workdir= is empty")


def test_a_verb_without_config_refuses_config():
    assert parse("--workdir=x", takes_config=False).workdir == "x"
    assert "config" not in vars(parse("--workdir=x", takes_config=False))
    found = problems_of("--workdir=x", "--config=y", "--config.train.steps=3", takes_config=False)
    assert [line.partition(":")[0] for line in found] == ["--config", "--config.train.steps"]


def test_backend_flags_are_optional():
    found = parse("--plugin=none", "--backend=npu", flags=BACKEND_FLAGS, takes_config=False)
    assert vars(found) == {"backend": "npu", "plugin": None, "options": None}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_wins_over_mistakes_and_exits_0(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--nonsense", flag)
    assert caught.value.code == 0
    assert "--workdir=DIR" in capsys.readouterr().out


def test_help_lists_every_section_and_key_with_type_default_and_doc():
    text = help_text("train", flags=[WORKDIR], summary="pretrains")
    one_line = " ".join(text.split())
    for key in all_keys().values():
        assert f"  {key.path}  ({key.type_words}; " in text
        assert " ".join(key.doc.split()) in one_line
    for name in sections():
        assert f"\n\n{name}: " in text
    assert "train.steps  (int; required)" in text
    assert "optim.clip_norm  (float or none; required)" in text
    assert "mesh.data  (int; default 1)" in text
    assert "data.weights  (floats separated by commas or none; default none)" in text
    assert "Example:\n  python -m llamajax.train --config=" in text
    assert max(map(len, text.splitlines())) <= 110


def test_importing_config_and_its_help_needs_no_jax():
    program = (
        "import sys\n"
        "from llamajax.config import help_text, load\n"
        "from llamajax.models.counts import num_parameters\n"
        "help_text('train'), num_parameters(load('configs/quickstart.py').model)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'numpy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "[]\n"
