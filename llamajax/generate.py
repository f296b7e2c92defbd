"""Continue prompts with a checkpoint: greedily, or by drawing tokens at random.

Example:
  python -m llamajax.generate --checkpoint=runs/quickstart --prompt="Call me"
  python -m llamajax.generate --checkpoint=hf/llama2_7b --prompts_file=questions.txt --json
  python -m llamajax.generate --checkpoint=hf/llama2_7b --interactive --temperature=0.8
"""

import sys

from llamajax.backends import with_huge_pages
from llamajax.config import parse_command_line
from llamajax.decoding.generate_options import GenerateOptions
from llamajax.errors import say
from llamajax.verbs import run_verb


def main(argv: list[str]) -> int:
    """Print texts or JSON lines on standard output and the speed on standard error."""
    flags = parse_command_line(argv, GenerateOptions, verb="generate", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.decoding.generator import open_session
    from llamajax.decoding.printed_texts import converse, write_json, write_text

    session, code = open_session(flags), 0
    try:
        if flags.interactive:
            converse(session, sys.stdin, sys.stdout)
        for n, prompts in enumerate(session.batches()):
            if flags.json:
                write_json(session, prompts, sys.stdout)
            else:
                sys.stdout.write("\n" * (n > 0))
                write_text(session, prompts, sys.stdout, with_prompt=True)
    except SystemExit as interrupted:
        code = interrupted.code
    if session.engine.times.batches:
        say(session.summary())
    return code


if __name__ == "__main__":
    with_huge_pages()
    run_verb(main)
