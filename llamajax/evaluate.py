"""`python -m llamajax.evaluate`: measure how well a checkpoint predicts a text."""

from llamajax.backends import with_huge_pages
from llamajax.config import Flag, parse_weights_command
from llamajax.evaluation.evaluate_options import EvaluateOptions, Protocol, check_options
from llamajax.verbs import run_verb

SUMMARY = "Measure how well a checkpoint predicts a text: loss, perplexity, bits per byte."
EXAMPLE = """python -m llamajax.evaluate --checkpoint=runs/quickstart --data=runs/quickstart/data
python -m llamajax.evaluate --checkpoint=hf/llama2_7b --text=book.txt --protocol=sliding_window"""

_FLAGS = (
    Flag(
        name="data",
        metavar="PREPARED",
        annotation=str | None,
        default=None,
        doc="directory written by llamajax.prepare, packed with document masks as in training: "
        "every token of a document but its BOS is a target once (of instruction data, those of "
        "the answers)",
    ),
    Flag(
        name="split",
        metavar="NAME",
        annotation=str | None,
        default=None,
        doc="with --data: the split to read; none: validation",
    ),
    Flag(
        name="text",
        metavar="FILE",
        annotation=str | None,
        default=None,
        doc="UTF-8 text, also .gz or .zst: all of it as one document with one BOS before it, read "
        "by the checkpoint's tokenizer; every token but the BOS is a target once",
    ),
    Flag(
        name="token_ids",
        metavar="FILE.npy",
        annotation=str | None,
        default=None,
        doc="integers (T,) or (B, T), used exactly as given, without BOS or windows; each row on "
        "its own, its first token is context alone",
    ),
    Flag(
        name="protocol",
        metavar="NAME",
        annotation=Protocol | None,
        default=None,
        doc="with --text. non_overlapping: window j reads tokens j*L to j*L + L - 1 of the text "
        "(L = --seq_len) and predicts the token after each, so that its first token, the last "
        "target of the window before, is context alone; the last window reads the last L tokens "
        "and scores those that are left (lm-evaluation-harness's rolling log-likelihood; figures "
        "in the manner of GPTQ leave out the last target of every window, and what is left). "
        "sliding_window: windows of L tokens begin every --stride "
        "tokens, and each scores only what no window before it scored, with at least L - stride "
        "tokens of context (Hugging Face's guide to perplexity of fixed-length models). "
        "none: non_overlapping",
    ),
    Flag(
        name="seq_len",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="tokens a row or window; none: with --data that of the run which made the "
        "checkpoint, else the model's context, at most 4096",
    ),
    Flag(
        name="stride",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="with sliding_window: tokens between windows, below --seq_len; none: half of it",
    ),
    Flag(
        name="batch_size",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="rows at a time, rounded up to the devices; changes memory and speed only; none: "
        "about 8,192 tokens a device",
    ),
    Flag(
        name="max_batches",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="stop after so many batches; none: all",
    ),
    Flag(
        name="per_token_nll",
        metavar="OUT.npy",
        annotation=str | None,
        default=None,
        doc="write the loss of every target in nats, float32: (B, T - 1) for --token_ids, else "
        "(1, number of targets) in the order of the text",
    ),
)


def main(argv: list[str]) -> int:
    """Print one JSON object on the last line of stdout; exit code 0."""
    asked = parse_weights_command(
        argv, verb="evaluate", flags=_FLAGS, summary=SUMMARY, example=EXAMPLE
    )
    options = EvaluateOptions(**asked)
    check_options(options)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.evaluation.evaluator import evaluate
    from llamajax.monitoring.jsonl import encode_row

    print(encode_row(evaluate(options)), flush=True)
    return 0


if __name__ == "__main__":
    with_huge_pages()
    run_verb(main)
