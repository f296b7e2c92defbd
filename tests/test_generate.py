"""The verb `generate`: prompts of every kind, what it prints where, and mistakes."""

import dataclasses
import io
import json
import signal
import subprocess
import sys

import pytest
import warm
from shell import verb
from workdirs import save_random

from llamajax import generate
from llamajax.config.presets import PRESETS
from llamajax.decoding import prompts
from llamajax.errors import UserError
from llamajax.formats.weights import open_weights

CONTEXT = PRESETS["tiny"].max_seq_len
TEXTS = ["Call me", "a much longer prompt than that", "é"]
MISTAKES = {
    "": "no prompt given: name exactly one",
    "--prompt=x --interactive": "--prompt and --interactive given: name exactly one",
    "--prompt_ids=": "--prompt_ids is empty",
    "--prompt_ids=x": "--prompt_ids=x: expected ints",
    "--prompt_ids=1,260": r"token id 260 is outside the model's vocabulary, 0\.\.259",
    "--prompt_ids=1 --max_new_tokens=128": "1 tokens and 128 new ones are more than .* of 128 .* "
    "at most 127$",
    f"--prompt={'x' * 127}": "128 tokens and a new one are more than .* shorten the prompt",
    "--prompt=x --temperature=-1 --top_k=0 --top_p=1.5 --repetition_penalty=0": "(?s)"
    r"top_k=0.*penalty=0.*temperature=-1\.0.*top_p=1\.5",
    "--prompt=x --seed=4294967296 --batch_size=0 --max_new_tokens=0": "(?s)tokens=0.*seed=.*size=0",
    "--prompt=x --stop_ids=260": r"--stop_ids: 260 is outside",
    "--prompt=x --chat_template=chatml": r"<\|im_start\|>",
    "--prompt_ids=1 --chat_template=llama2": "--chat_template is for texts",
    "--prompt=x --mesh=tensor=8": "num_kv_heads = 2 does not divide over mesh.tensor = 8",
    "--prompt=x --mesh=sequence=2,data=4": "sequence must be 1",
    "--prompts_file=missing": "there is no such file",
    "--prompts_file=.": "is a directory",
    "--prompts_file=blank.txt": "holds no prompt",
    "--prompts_file=bad.jsonl": r'bad\.jsonl:2: no text under "prompt"',
    "--prompts_file=long.txt": r"(?s)long\.txt:1: 131 tokens.*long\.txt:3: 141 tokens",
    "--prompts_file=latin1.txt": "not UTF-8",
}


def checkpoint(workdir, *, vocab_size: int, tokenizer: bool):
    """A workdir of train with one checkpoint of a random model."""
    save_random(workdir, dataclasses.replace(PRESETS["tiny"], vocab_size=vocab_size, num_layers=1))
    if tokenizer:
        (workdir / "tokenizer.byte").touch()
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two tokens more than the tokenizer of bytes has."""
    return checkpoint(tmp_path_factory.mktemp("run"), vocab_size=260, tokenizer=True)


def run(capsys, workdir, *args):
    """What stands on stdout, and on stderr."""
    assert generate.main([f"--checkpoint={workdir}", *args]) == 0
    return capsys.readouterr()


def rows(capsys, workdir, *args) -> list[dict]:
    found = [json.loads(line) for line in run(capsys, workdir, "--json", *args).out.splitlines()]
    assert all(row.keys() == {"prompt_ids", "output_ids", "text"} for row in found)
    return found


def test_a_file_of_prompts_gives_what_each_gives_alone(workdir, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n\n".join(TEXTS) + "\r\n")
    (tmp_path / "p.json").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    args = ("--max_new_tokens=9", "--ignore_eos", "--dtype=float32")
    found = rows(capsys, workdir, f"--prompts_file={tmp_path / 'p.txt'}", "--batch_size=2", *args)
    expected = [[256, *text.encode()] for text in TEXTS]
    assert [row["prompt_ids"] for row in found] == expected
    assert {len(row["output_ids"]) for row in found} == {9}
    assert found == rows(capsys, workdir, f"--prompts_file={tmp_path / 'p.json'}", *args)
    (alone,) = rows(capsys, workdir, f"--prompt={TEXTS[1]}", "--mesh=fsdp=4,tensor=2", *args)
    assert alone == found[1]
    ids = ",".join(map(str, expected[2]))
    assert rows(capsys, workdir, f"--prompt_ids={ids}", *args) == found[2:]


def test_text_is_the_prompt_and_what_follows_and_speed_is_on_stderr(workdir, capsys):
    args = ("--prompt=none", "--max_new_tokens=40", "--temperature=1.5", "--seed=5")
    printed = run(capsys, workdir, *args)
    (row,) = rows(capsys, workdir, *args)
    assert printed.out == "none" + row["text"] + "\n"
    assert "first token after" in printed.err
    assert "tokens/s" in printed.err
    assert max(row["output_ids"]) < 260
    assert rows(capsys, workdir, *args, "--seed=6") != [row]
    (chat,) = rows(capsys, workdir, *args, "--chat_template=llama2")
    assert chat["prompt_ids"] == [256, *b"[INST] none [/INST]"]


def test_generation_ends_at_stop_tokens_and_at_the_context(workdir, capsys):
    flags = ("--prompt_ids=7,8,9", "--ignore_eos")
    (free,) = rows(capsys, workdir, *flags)
    assert len(free["output_ids"]) == CONTEXT - 3
    stop = free["output_ids"][1]
    (stopped,) = rows(capsys, workdir, *flags, f"--stop_ids={stop},5")
    assert stopped["output_ids"] == free["output_ids"][: free["output_ids"].index(stop) + 1]


def test_each_prompt_of_a_batch_has_the_room_that_its_own_length_leaves(workdir, tmp_path, capsys):
    lengths = (3, 120, 60)
    (tmp_path / "p.txt").write_text("\n".join("x" * n for n in lengths))
    found = rows(capsys, workdir, f"--prompts_file={tmp_path / 'p.txt'}", "--ignore_eos")
    assert [len(row["output_ids"]) for row in found] == [CONTEXT - n - 1 for n in lengths]


def test_prompts_are_typed_until_the_input_ends(workdir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Call me\n\n{'x' * 200}\nIshmael"))
    printed = run(capsys, workdir, "--interactive", "--max_new_tokens=5", "--json")
    first, second = map(json.loads, printed.out.splitlines())
    assert bytes(first["prompt_ids"][1:]) == b"Call me"
    assert bytes(second["prompt_ids"][1:]) == b"Ishmael"
    assert "error: this prompt: 201 tokens and 5 new ones" in printed.err


def test_a_checkpoint_without_a_tokenizer_takes_ids_alone(tmp_path, capsys):
    folder = checkpoint(tmp_path, vocab_size=90, tokenizer=False)
    (row,) = rows(capsys, folder, "--prompt_ids=3,1", "--max_new_tokens=4")
    assert (row["prompt_ids"], row["text"]) == ([3, 1], None)
    printed = run(capsys, folder, "--prompt_ids=3,1", "--max_new_tokens=4")
    assert printed.out == ",".join(map(str, row["output_ids"])) + "\n"
    for flag in ("--prompt=x", "--interactive"):
        with pytest.raises(UserError, match="no tokenizer"):
            generate.main([f"--checkpoint={folder}", flag])
    (tmp_path / "tokenizer.byte").touch()
    with pytest.raises(UserError, match=r"258 tokens and the model's vocabulary only 90"):
        generate.main([f"--checkpoint={folder}", "--prompt=x"])


@pytest.mark.parametrize("fault", ["torn", "larger", "another"])
def test_ids_are_continued_whatever_the_tokenizer(fault, tmp_path, monkeypatch, capsys):
    folder = checkpoint(tmp_path, vocab_size=200 if fault == "larger" else 260, tokenizer=True)
    if fault == "torn":
        (tmp_path / "tokenizer.byte").rename(tmp_path / "tokenizer.model")
    if fault == "another":
        record = {"kind": "byte", "vocab_size": 258, "fingerprint": "0" * 64, "probe": ""}
        opened = dataclasses.replace(open_weights(folder), tokenizer_record=record)
        monkeypatch.setattr("llamajax.decoding.generator.open_weights", lambda _: opened)
    flags = [f"--checkpoint={folder}", "--max_new_tokens=2", "--json"]
    assert generate.main([*flags, "--prompt_ids=3,1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text"] is None
    assert "warning: the ids are continued without a tokenizer" in printed.err
    with pytest.raises(UserError):
        generate.main([*flags, "--prompt=x"])


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_named(workdir, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    (tmp_path / "long.txt").write_text(f"{'x' * 130}\nok\n{'y' * 140}\n")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin1"))
    with pytest.raises(UserError, match=MISTAKES[flags]):
        generate.main([f"--checkpoint={workdir}", *flags.split()])


def test_eos_is_that_of_transformers_then_the_tokenizers(tmp_path):
    assert prompts.eos_ids(tmp_path, None) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert prompts.eos_ids(tmp_path, None) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert prompts.eos_ids(tmp_path, None) == (8, 9)


def test_sampling_flags_without_a_temperature_are_a_warning(workdir, capsys):
    generate.main([f"--checkpoint={workdir}", "--prompt=x", "--top_k=3", "--max_new_tokens=1"])
    assert "--top_k and --top_p have no effect at --temperature=0" in capsys.readouterr().err


def test_a_signal_ends_a_conversation_with_143(workdir):
    flags = (f"--checkpoint={workdir}", "--interactive", "--max_new_tokens=2")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with warm.Popen(verb("generate", *flags), text=True, **pipes) as process:
        process.stdin.write("line\n")
        process.stdin.flush()
        process.stdout.readline()  # it has answered, and waits for the next line
        process.send_signal(signal.SIGHUP)
        err = process.stderr.read()
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "tokens/s" in err  # the summary
    assert err.endswith("stopped by SIGHUP\n")
