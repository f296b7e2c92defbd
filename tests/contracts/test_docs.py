"""README and docs: their commands parse, their links lead somewhere, their messages exist."""

import ast
import importlib
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from shell import shell

from llamajax.cli import verbs
from llamajax.config.command_line import parse_command_line
from llamajax.config.flags import Flags, TrainFlags
from llamajax.config.keys import all_keys, own_keys, sections
from llamajax.config.values import Key, Mistyped
from llamajax.errors import UserError
from llamajax.models.counts import num_parameters

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
# Keys of MindFormers' two pretraining configs, as they were before their deletion (June 2025).
MINDFORMERS = Path(__file__).with_name("mindformers_keys.txt")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?:python -m llamajax\.|(?<![\w/.`-])llamajax )(\w+)\b(?!\.py)")
# What stands for a value: N, FILE, ADDR:PORT, $RUN, a..., [--flag].
_PLACEHOLDER = re.compile(r"[$\[\]|]|\.\.\.|(?<!\w)[A-Z][A-Z_]*(?![\w.])")
# Flags of scripts in launch/ and benchmarks/, and of SLURM.
OTHERS = {"help", "extra", "all", "size", "minutes", "signal", "array"}
_NAMES_OF_FILES = ("log", "md", "py", "gguf", "json", "jsonl", "model")


def code_spans(text: str) -> list[str]:
    """The pieces of inline code."""
    return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    """The lines of code blocks without a language, continued ones joined."""
    for language, block in _BLOCK.findall(text):
        if not language:
            yield from re.sub(r"\\\n\s*", "", block).splitlines()


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """Verb and flags of each llamajax command in a line; one behind `launch ... --` is its own."""
    found = [match for match in _COMMAND.finditer(line) if match[1] in verbs()]
    ends = [*(match.start() for match in found), len(line)][1:]
    for match, end in zip(found, ends, strict=True):
        try:
            words = shlex.split(line[match.end() : end], comments=True)
        except ValueError:
            words = line[match.end() : end].split()
        words = [word.strip("[]") for word in words]
        yield match[1], [word for word in words if word[:2] == "--" or word[:1] in ("$", ".")]


def all_commands(page: Path, *, spans: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Verb and flags of a page's commands; `spans`: also of those in lines of text."""
    text = page.read_text(encoding="utf-8")
    lines = [*shell_lines(text), *(code_spans(text) if spans else [])]
    found = [(verb, flags) for line in lines for verb, flags in commands(line)]
    return [(verb, tuple(flag for flag in flags if flag != "--")) for verb, flags in found]


def flag_classes(verb: str) -> list[type[Flags]]:
    """The classes of a verb's flags: `prepare` has two, `train` imports its own when it is run."""
    names = vars(importlib.import_module(f"llamajax.{verb}")).values()
    classes = [c for c in names if isinstance(c, type) and issubclass(c, Flags)]
    return classes if verb != "train" else [TrainFlags]


def flags_of(verb: str) -> dict[str, Key]:
    """Every flag of a verb, by name."""
    return {key.path: key for cls in flag_classes(verb) for key in own_keys(cls).values()}


def problems_of(verb: str, word: str) -> Iterator[str]:
    """What the parser would say of one flag, whose value may be a placeholder."""
    name, _, value = word.removeprefix("--").partition("=")
    known = flags_of(verb) | {f"config.{path}": key for path, key in all_keys().items()}
    if name in ("help", "version", "serve") or _PLACEHOLDER.search(name):
        return
    if name not in known:
        yield f"{word}: {verb} has no such flag"
    elif value and not _PLACEHOLDER.search(value) and name != "config":
        try:
            known[name].parse(value)
        except Mistyped as error:
            yield f"{word}: {error}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_keys_exist(page: Path):
    found = []
    for verb, flags in all_commands(page, spans=True):
        found += [problem for flag in flags for problem in problems_of(verb, flag)]
    text = page.read_text(encoding="utf-8")
    known = {flag for verb in verbs() for flag in flags_of(verb)} | OTHERS
    for span in code_spans(text):
        if match := re.match(r"--(?!config\b|xla)(\w+)", span):
            found += [f"--{match[1]}: no verb has it"] * (match[1] not in known)
    if page.name.startswith("from-"):  # in their tables, the last column is ours
        text = re.sub(r"^\|.*\|([^|\n]*)\|$", r"\1", text, flags=re.MULTILINE)
    for span in code_spans(text):
        for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(sections())})\.[a-z_][\w.]*\w", span):
            if path.rpartition(".")[2] not in _NAMES_OF_FILES and path not in all_keys():
                found.append(f"`{span}`: there is no key {path}")
    assert not found


def whole_commands() -> list[tuple[str, tuple[str, ...]]]:
    """Verb and flags of the commands that have all their values; those of `launch` are not ours."""
    found = [command for page in PAGES for command in all_commands(page, spans=False)]
    found = [(verb, flags) for verb, flags in dict.fromkeys(found) if verb != "launch" and flags]
    return [(verb, flags) for verb, flags in found if not _PLACEHOLDER.search(" ".join(flags))]


def test_commands_pass_the_parser(monkeypatch: pytest.MonkeyPatch):
    """As a whole: required flags, config files, and what does not go together."""
    monkeypatch.chdir(ROOT)
    found = whole_commands()
    assert len(found) > 40
    for verb, flags in found:
        names = {flag.removeprefix("--").partition("=")[0] for flag in flags}
        if names & {"help", "version", "serve"}:
            continue
        assert any(passes(verb, flags, cls) for cls in flag_classes(verb)), (verb, flags)


def passes(verb: str, flags: Sequence[str], cls: type[Flags]) -> bool:
    """Whether the parser takes these flags as those of `cls`; a verb may have several classes."""
    try:
        parse_command_line(flags, cls, verb=verb, doc="")
    except UserError as error:
        print(error)
        return False
    return True


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")):
        if "://" not in target:
            path = (page.parent / target) if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_index_has_each_page_once():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text("utf-8"))
    assert sorted([*linked, "index.md"]) == [page.name for page in DOCS], "one line a page"


def texts_of_the_package() -> Iterator[str]:
    """Every string of the source, with a NUL where an f-string has a value."""
    for path in (ROOT / "llamajax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)


def test_messages_of_troubleshooting_are_in_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    texts = list(texts_of_the_package())
    lost = []
    for message in quoted:
        pieces = [re.escape(piece.strip(" ")) for piece in message.split("...") if piece.strip()]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        lost += [message] * (not any(map(pattern.search, texts)))
    assert not lost, "docs/troubleshooting.md quotes messages that no file has"


def test_all_keys_of_mindformers_are_mapped():
    """The last part of a path is enough where its section's table names the rest."""
    spans = set(code_spans((ROOT / "docs" / "from-mindformers.md").read_text(encoding="utf-8")))
    spans = {span.partition(":")[0] for span in spans}
    keys = MINDFORMERS.read_text(encoding="utf-8").splitlines()
    assert len(keys) > 120
    assert [key for key in keys if key not in spans] == []


def test_the_config_of_configs_md_is_whole(tmp_path: Path):
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    (source,) = [block for language, block in _BLOCK.findall(page) if language == "python"]
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    flags = (f"--config={path}", f"--workdir={tmp_path}/run")
    config = parse_command_line(flags, TrainFlags, verb="train", doc="").config
    assert num_parameters(config.model) == 124_668_672


def test_flags_of_the_kubernetes_template_exist():
    lines = (ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8")
    words = re.findall(r"^ +- (llamajax\.\w+|--\w.*)$", lines, re.MULTILINE)
    at = words.index("llamajax.train")
    found = [problem for word in words[1:at] for problem in problems_of("launch", word)]
    found += [problem for word in words[at + 1 :] for problem in problems_of("train", word)]
    assert len(words) > 8
    assert not found


def test_a_package_index_gets_no_link_to_a_file():
    """setup.py takes them out; links of the web stay."""
    make = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["without_local_links"]
    assert make("![a](b.svg)\n\n[c](d.md#e) [f](https://g)") == "c [f](https://g)"
    links = re.findall(r"\]\(([^)]*)\)", make((ROOT / "README.md").read_text(encoding="utf-8")))
    assert all(link.startswith("https://") for link in links)


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^## .*{version}", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


# What no test's CPU has: devices, weights and data of others, servers, a terminal, an hour.
_NOT_HERE = re.compile(
    r"hf/llama|hf/smollm|llama2|llama3|=gs://|=s3://|/shared|web/|wiki|=npu|--interactive|--serve|--search"
    r"|--devices|chats|row_attention|verify_resume|launch --|data/code|=questions|harness"
)
_SHORT = {
    "train.steps": 4, "train.eval_batches": 1, "train.loss_chunk_tokens": 128, "data.seq_len": 64,
    "checkpoint.every_steps": 2, "model.num_layers": 1,
}  # fmt: skip


def runnable_commands() -> list[tuple[str, ...]]:
    """The commands of all pages that a CPU can run, in the order of a new user; runs are short."""
    first = [
        "first-run",
        "data",
        "configs",
        "training",
        "weights",
        "evaluation",
        "optimizers",
        "finetuning",
    ]
    found = {}
    for page in dict.fromkeys([*(ROOT / "docs" / f"{name}.md" for name in first), *PAGES]):
        for command in all_commands(page, spans=False):
            line = "\0".join([command[0], *command[1]])
            line = re.sub(r"(resume_step=|@)\d+", r"\g<1>2", line).replace("20:25", "2:3")
            line = re.sub(r"\0--config\.train\.steps=\d+", "", line)
            if not _PLACEHOLDER.search(line) and not _NOT_HERE.search(line.replace("\0", " ")):
                found[tuple(line.split("\0"))] = None
    return list(found)


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path):
    """As a new user runs them: beside the text and the configs, the folder is empty."""
    text = (ROOT / "launch" / "text" / "moby_dick.txt").read_text(encoding="utf-8")[:400_000]
    for name in ("my/a.txt", "book.txt", "launch/text/moby_dick.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = [f"--config.{key}={value}" for key, value in _SHORT.items()]
    found = runnable_commands()
    assert len(found) > 20
    for verb, *flags in found:
        is_run = verb == "train" and not flags[0].startswith("--help")
        done = shell(verb, *flags, *(short if is_run else []), cwd=tmp_path)
        assert done.returncode == 0, f"{verb} {flags}: {done.stderr[-2000:]}"
