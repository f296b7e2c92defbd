"""Numbers of EleutherAI's harness with our model, beside those of its own Hugging Face backend."""

import json
from pathlib import Path

import pytest
import tokenizers
from chat_cases import save_byte_level
from llama_cases import CONTEXT, EVALUATED, save_hugging_face, weights
from tokenizers.processors import TemplateProcessing

from llamajax import convert, evaluate
from llamajax.errors import UserError

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]  # of datasets and the harness

QUESTIONS = [
    {"question": f"{n} whales and a ", "choices": ["ship", "é", f"sailor of {n}"], "answer": n % 3}
    for n in range(20)
]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metrics": ["acc", "acc_norm", "acc_bytes"],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}" * 5,
        "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    },
    "local_last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}" * 5,
        "doc_to_target": "{{choices[2]}}",
        "metrics": ["acc", "perplexity"],
    },
}
PAIRS = [
    ("Call me", " Ishmael."),
    ("ends in white space \n ", "x"),
    ("", "no context"),
    ("é" * 40, " longer than the context"),
    *(("Call me", chr(n)) for n in range(33, 127)),
]
CONTEXTS = ["Call me", "w" * 70, "", "é"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A small model with a tokenizer of bytes that begins texts with BOS, as we export it."""
    folder, config = tmp_path_factory.mktemp("model"), EVALUATED["grouped"]
    save_hugging_face(folder / "source", config, weights(config, std=0.2))
    file = save_byte_level(folder / "source" / "tokenizer.json", ["<s>", "</s>"], bos="<s>")
    library = tokenizers.Tokenizer.from_file(str(file))
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))])
    library.post_processor = bos
    library.save(str(file))
    flags = [f"--from={folder / 'source'}", f"--to={folder / 'hf'}", "--dtype=float32"]
    assert convert.main(flags) == 0
    return folder / "hf"


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory) -> Path:
    """A directory of three tasks on a file beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in TASKS.items():
        metrics = [{"metric": metric} for metric in task["metrics"]]
        fixed = {"task": name, "dataset_path": "json", "test_split": "test"}
        fixed["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        task = {key: value for key, value in task.items() if key != "metrics"}
        text = json.dumps(fixed | task | {"metric_list": metrics})  # JSON is YAML
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def theirs(exported):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def ours(exported):
    from llamajax.evaluation.harness import HarnessModel

    return HarnessModel(checkpoint=str(exported), dtype="float32", mesh="fsdp=4,tensor=2")


def asked(kind: str, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def test_tasks_have_the_numbers_of_the_harness(theirs, exported, local_tasks, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(local_tasks))
    expected = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager)["results"]
    flags = [f"--harness={','.join(TASKS)}", f"--harness_tasks={local_tasks}", "--dtype=float32"]
    assert evaluate.main([f"--checkpoint={exported}", *flags, "--mesh=data=2,fsdp=4"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*found["tasks"]} == {*TASKS}
    compared = 0
    for name, figures in found["tasks"].items():
        assert len(figures) == 2 * len(TASKS[name]["metrics"])
        for metric, value in figures.items():
            wanted = expected[name][metric]
            if "perplexity_stderr" not in metric and isinstance(wanted, float):
                assert value == pytest.approx(wanted, rel=1e-5), (name, metric)
                compared += 1
    assert compared >= 11
    assert 0 < found["tasks"]["local_choice"]["acc,none"] < 1
    assert found["tokens"] > 1000


def test_log_likelihoods_are_those_of_the_harness(ours, theirs):
    requests = asked("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for (log, is_greedy), (their_log, is_theirs) in zip(found, expected, strict=True):
        assert log == pytest.approx(their_log, rel=1e-5)
        assert is_greedy is is_theirs
    assert ours.loglikelihood([]) == ours.loglikelihood_rolling([]) == []
    texts = asked("loglikelihood_rolling", [("of many windows " * 20,), ("é",)])
    found = ours.loglikelihood_rolling(texts)
    assert found == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


def test_greedy_continuations_end_where_theirs_do(ours, theirs):
    plain = {"until": [], "max_gen_toks": 12}
    (text,) = theirs.generate_until(asked("generate_until", [("Call me", plain)]))
    assert len(text) > 2
    for until in ([], [text[2]], ["nothing like it", text[1:3]]):
        arguments = [(context, plain | {"until": until}) for context in CONTEXTS if context]
        requests = asked("generate_until", arguments)
        assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_what_cannot_be_done_is_refused(ours, exported, tmp_path):
    with pytest.raises(UserError, match=f"300 tokens; the context of {CONTEXT}"):
        ours.generate_until(asked("generate_until", [("a", {"max_gen_toks": 300})]))
    with pytest.raises(UserError, match=r"generates with \['typical_p'\]"):
        ours.generate_until(asked("generate_until", [("a", {"typical_p": 1, "max_gen_toks": 3})]))
    with pytest.raises(UserError, match="has 99 tokens; it must have between 1 and"):
        ours.loglikelihood(asked("loglikelihood", [("a", "b" * 99)]))
    with pytest.raises(UserError, match="--harness=no_such_task"):
        evaluate.main([f"--checkpoint={exported}", "--harness=no_such_task"])
