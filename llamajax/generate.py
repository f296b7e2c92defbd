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
    options = parse_command_line(argv, GenerateOptions, verb="generate", doc=__doc__)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.decoding.generator import open_generator
    from llamajax.decoding.printed_texts import converse, write_json, write_text

    generator = open_generator(options)
    try:
        if options.interactive:
            converse(generator, sys.stdin, sys.stdout)
        for n, prompts in enumerate(generator.batches()):
            if options.json:
                write_json(generator, prompts, sys.stdout)
            else:
                sys.stdout.write("\n" * (n > 0))
                write_text(generator, prompts, sys.stdout, with_prompt=True)
    finally:  # also at a stop signal
        if generator.engine.times.batches:
            say(generator.summary())
    return 0


if __name__ == "__main__":
    with_huge_pages()
    run_verb(main)
