"""The command line: spellings, and every mistake of it and of the config in one message."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused

from llamajax.config import BackendFlags, Flags, TrainFlags, key, parse_command_line
from llamajax.config.command_line import help_text
from llamajax.config.keys import all_keys, sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags(TrainFlags):
    search: bool = key("rank the choices", default=False)
    count: int = key("how many", default=3, at_least=1)
    text: str = key("any text", default="")

    def problems(self):
        if self.count > 9 and self.search:
            yield "--count=10: too many for --search"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    from_: str = key("what to read", is_path=True)
    command: tuple[str, ...] = ()


def parse(*argv: str, flags=SearchFlags):
    return parse_command_line(argv, flags, verb="train", doc="Do it.")


def problems_of(*argv: str, flags=SearchFlags) -> list[str]:
    with refused("python -m llamajax.train --help") as lines:
        parse(*argv, flags=flags)
    assert lines[0].startswith(f"{len(lines) - 1} problem")
    return [line.removeprefix("  - ") for line in lines[1:]]


@pytest.mark.parametrize(
    "line",
    [
        "--config={} --workdir=out --config.train.steps=20 --config.mesh.fsdp=-1",
        "--config {} --workdir out --config.train.steps 2e1 --config.mesh.fsdp -1",
        "--config.train.steps=9 --config={} --config.mesh.fsdp=-1 --workdir=out "
        "--config.train.steps=20",
    ],
)
def test_all_spellings_of_a_flag(config_file, line):
    path = config_file()
    found = parse(*line.format(path).split())
    assert (found.config_file, found.workdir, found.search, found.count) == (path, "out", False, 3)
    assert (found.config.train.steps, found.config.mesh.fsdp) == (20, -1)


def test_switches_stand_alone_or_take_a_value(config_file):
    head = (f"--config={config_file()}", "--workdir=out")
    assert parse(*head, "--search", "--count=4").search is True
    assert parse(*head, "--search", "false").search is False
    assert parse(*head, "--search=false").search is False
    found = parse(*head, "--config.data.shuffle", "false", "--config.checkpoint.asynchronous")
    assert (found.config.data.shuffle, found.config.checkpoint.asynchronous) == (False, True)


def test_a_value_may_hold_an_equals_sign_be_empty_or_be_none(config_file):
    head = (f"--config={config_file()}", "--workdir=a=b", "--config.backend.name=npu")
    found = parse(*head, "--config.backend.options=k=v,l=w", "--text=")
    assert (found.workdir, found.config.backend.options, found.text) == ("a=b", "k=v,l=w", "")
    assert parse(*head, "--text=none").text == "none"


def test_a_tilde_is_the_home_directory_in_paths_only(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    found = parse(
        f"--config={config_file()}", "--workdir=~/out", "--text=~/text",
        "--config.data.path=~/a,b~,~/c", "--config.model.name=~/name",
        "--config.backend.options=n=~1,lib=~/lib.so", "--config.backend.name=npu",
    )  # fmt: skip
    assert (found.workdir, found.text) == ("/home/x/out", "~/text")
    assert found.config.data.path == "/home/x/a,b~,/home/x/c"
    assert found.config.model.name == "~/name"
    assert found.config.backend.options == "n=~1,lib=/home/x/lib.so"
    assert parse("--from", "~", flags=OutputFlags).from_ == "/home/x"
    path = Path(config_file())
    monkeypatch.setenv("HOME", str(path.parent))
    assert parse(f"--config=~/{path.name}", "--workdir=out").config_file == str(path)


def test_what_stands_after_the_first_dashes_is_the_command():
    for argv, command in (("--from x", ""), ("--from=x -- a --help -- b", "a --help -- b")):
        found = parse(*argv.split(), flags=OutputFlags)
        assert (found.from_, found.command) == ("x", tuple(command.split()))
    assert problems_of("--from", "x", "a", "b", "--c=d", flags=OutputFlags) == [
        "there is no -- before the command: write `-- a b --c=d ...`"
    ]
    usage = help_text(OutputFlags, verb="x", doc="").partition("Usage:\n")[2].splitlines()[0]
    assert usage == "  python -m llamajax.x --from=VALUE -- COMMAND..."


def test_every_mistake_of_flags_and_config_is_named_at_once(config_file):
    found = problems_of(
        f"--config={config_file('config.optim.beta3 = 1')}", "--wrokdir=out", "stray", "--steps=3",
        "--train.steps=3", "-x", "--count=many", "--config.train.stepz=3", "--config.train.seed=x",
        "--config.data=x", "--config.train.log_every",
    )  # fmt: skip
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
        assert fragment in "\n".join(found)
    assert len(found) == 12


def test_ranges_and_contradictions_are_named_with_the_mistakes_of_the_config(config_file):
    head = (f"--config={config_file()}", "--workdir=x", "--config.train.steps=0")
    assert problems_of(*head, "--count=0")[0] == "--count=0: must be at least 1"
    assert len(found := problems_of(*head, "--count=10", "--search")) == 2
    assert found[1] == "--count=10: too many for --search"


def test_required_flags_are_named():
    assert problems_of("--workdir=")[0].startswith(
        "--config=FILE.py[:ARG] is required: Python file"
    )
    assert problems_of("--workdir=")[1].startswith("--workdir= is empty: directory of the run")


def test_a_verb_without_config_refuses_config():
    found = problems_of("--from=x", "--config=y", "--config.train.steps=3", flags=OutputFlags)
    assert [line.partition(":")[0] for line in found] == ["--config", "--config.train.steps"]


def test_backend_flags_are_optional():
    found = parse("--plugin=none", "--backend=npu", flags=BackendFlags)
    assert (found.backend, found.plugin, found.backend_config.name) == ("npu", None, "npu")
    assert problems_of("--plugin=x", flags=BackendFlags) == [
        "--plugin needs --backend, the plugin's platform"
    ]


@pytest.mark.parametrize(
    ("flag", "words"), [("--help", "--workdir=DIR"), ("-h", "Do it."), ("--version", "llamajax ")]
)
def test_help_and_version_win_over_mistakes_and_exit_0(flag, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--nonsense", flag)
    assert caught.value.code == 0
    assert words in capsys.readouterr().out


def test_help_lists_every_section_and_key_with_type_default_and_doc():
    text = help_text(TrainFlags, verb="train", doc="Do it.\n\nExample:\n  python -m x\n")
    one_line = " ".join(text.split())
    for each in all_keys().values():
        assert f" {each.path} ({each.type_words}; " in one_line
        assert " ".join(each.doc.split()) in one_line
    for name in sections():
        assert f"\n\n{name}: " in text
    assert "train.steps  (int; required)" in text
    assert "optim.clip_norm  (float or none; required)" in text
    assert "model.rope_scaling.factor  (float; required unless model.rope_scaling is none)" in text
    assert "mesh.data  (int; default 1)" in text
    assert "data.weights  (floats separated by commas or none; default none)" in text
    assert "Example:\n  python -m x\n\nUsage:\n  python -m llamajax.train --config=" in text
    assert max(map(len, text.splitlines())) <= 110


def test_help_is_about_a_word_and_fits_the_terminal(monkeypatch):
    about = help_text(TrainFlags, verb="train", doc="", word="CLIP")
    assert about.splitlines()[0] == "  --config.optim.clip_norm  (float or none; required)"
    assert "workdir" not in about
    assert "nothing here is about 'zzz'" in help_text(TrainFlags, verb="x", doc="", word="zzz")
    monkeypatch.setenv("COLUMNS", "50")
    lines = help_text(TrainFlags, verb="train", doc="").splitlines()
    sections_end = [f"{name}: " for name in sections()]
    assert max(len(line) for line in lines if not line.startswith(tuple(sections_end))) <= 51


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--batch_size=4", "flag; did you mean --config.data.global_batch_size?"),
        ("--config.mesh.tp=2", "key; did you mean --config.mesh.tensor?"),
        ("--config.optim.lr=1", "key; did you mean --config.optim.learning_rate?"),
        ("--config.monitoring.tensorboard=false", "key; false is now --config.monitoring.sinks="),
        ("--monitoring.tensorboard=false", "flag; false is now --config.monitoring.sinks=jsonl"),
    ],
)
def test_names_of_other_systems_and_former_ones_are_known(config_file, flag, words):
    (problem,) = problems_of(f"--config={config_file('')}", "--workdir=x", flag)
    assert problem.startswith(f"{flag.partition('=')[0]}: unknown {words}")


def test_importing_config_and_its_help_needs_no_jax():
    program = (
        "import sys\n"
        "from llamajax.config import TrainFlags, load\n"
        "from llamajax.config.command_line import help_text\n"
        "from llamajax.models.counts import num_parameters\n"
        "help_text(TrainFlags, verb='train', doc='')\n"
        "num_parameters(load('configs/quickstart.py').model)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
