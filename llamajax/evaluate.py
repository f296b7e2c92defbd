"""Measure how well a checkpoint predicts a text: loss, perplexity, bits per byte.

Example:
  python -m llamajax.evaluate --checkpoint=runs/quickstart --data=runs/quickstart/data
  python -m llamajax.evaluate --checkpoint=hf/llama2_7b --text=book.txt --protocol=sliding_window
"""

from llamajax.backends import with_huge_pages
from llamajax.config import parse_command_line
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Print one JSON object on the last line of standard output; return 0."""
    options = parse_command_line(argv, EvaluateOptions, verb="evaluate", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.evaluation.evaluator import evaluate
    from llamajax.monitoring.jsonl import encode_row

    print(encode_row(evaluate(options)), flush=True)
    return 0


if __name__ == "__main__":
    with_huge_pages()
    run_verb(main)
