"""`python -m llamajax.generate`: continue prompts with a checkpoint, or talk to it."""

import sys
from typing import Literal

from llamajax.backends import with_huge_pages
from llamajax.config import Flag, parse_weights_command
from llamajax.decoding.generate_options import GenerateOptions, Sampling, check_options
from llamajax.errors import say
from llamajax.tokenizers.chat import CHAT_TEMPLATES
from llamajax.verbs import run_verb

SUMMARY = "Continue prompts with a checkpoint: greedily, or drawing tokens at random."
EXAMPLE = """python -m llamajax.generate --checkpoint=runs/quickstart --prompt="Call me"
python -m llamajax.generate --checkpoint=hf/llama2_7b --prompts_file=questions.txt --json
python -m llamajax.generate --checkpoint=hf/llama2_7b --interactive --temperature=0.8"""

_FLAGS = (
    Flag(
        name="prompt",
        metavar="TEXT",
        annotation=str,
        default=None,
        verbatim=True,
        doc="text to continue, after a BOS; may be empty",
    ),
    Flag(
        name="prompts_file",
        metavar="F",
        annotation=str | None,
        default=None,
        doc="a prompt a line, or JSON lines with a `prompt`; empty lines count for nothing",
    ),
    Flag(
        name="prompt_ids",
        metavar="1,2,3",
        annotation=tuple[int, ...] | None,
        default=None,
        doc="token ids to continue, exactly these: no BOS, no tokenizer needed",
    ),
    Flag(
        name="interactive",
        annotation=bool,
        default=False,
        doc="read prompts from the terminal or a pipe, one a line, each on its own; Ctrl-D leaves",
    ),
    Flag(
        name="chat_template",
        metavar="NAME",
        annotation=Literal[CHAT_TEMPLATES],
        default="none",
        doc="not none: each prompt is the user's message in a chat of this form",
    ),
    Flag(
        name="max_new_tokens",
        metavar="N",
        annotation=int | None,
        default=None,
        doc="most new tokens a prompt; none: 128, or fewer where the context ends",
    ),
    Flag(
        name="temperature",
        metavar="X",
        annotation=float,
        default=0.0,
        doc="0: the most probable token; 1: as the model says; in between: safer",
    ),
    Flag(
        name="top_k",
        metavar="K",
        annotation=int | None,
        default=None,
        doc="draw among the K most probable tokens only",
    ),
    Flag(
        name="top_p",
        metavar="P",
        annotation=float | None,
        default=None,
        doc="draw among the most probable tokens that together reach probability P only",
    ),
    Flag(
        name="repetition_penalty",
        metavar="X",
        annotation=float,
        default=1.0,
        doc="divides positive logits, and multiplies negative ones, of tokens in prompt or output",
    ),
    Flag(
        name="seed",
        metavar="S",
        annotation=int,
        default=0,
        doc="of the random draws; the same text on every mesh and in every batch",
    ),
    Flag(
        name="stop_ids",
        metavar="1,2",
        annotation=tuple[int, ...],
        default=(),
        doc="token ids that end the text, besides EOS",
    ),
    Flag(name="ignore_eos", annotation=bool, default=False, doc="whether to go on after EOS"),
    Flag(
        name="json",
        annotation=bool,
        default=False,
        doc="print one JSON object a prompt, one line each: prompt_ids, output_ids (new tokens, "
        "the stop token included), text (null without a tokenizer)",
    ),
    Flag(
        name="batch_size",
        metavar="N",
        annotation=int,
        default=8,
        doc="prompts of a file at a time; changes memory and speed only",
    ),
)
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


def main(argv: list[str]) -> int:
    """Texts or JSON lines on stdout, speed on stderr."""
    asked = parse_weights_command(
        argv, verb="generate", flags=_FLAGS, summary=SUMMARY, example=EXAMPLE
    )
    sampling = Sampling(**{name: asked.pop(name) for name in _SAMPLING})
    options = GenerateOptions(sampling=sampling, **asked)
    check_options(options)
    # JAX takes seconds to import: --help and mistakes are answered without it.
    from llamajax.decoding.generator import open_generator
    from llamajax.decoding.printed_texts import converse, write_json, write_text

    generator, code = open_generator(options), 0
    try:
        if options.interactive:
            converse(generator, sys.stdin, sys.stdout)
        for n, prompts in enumerate(generator.batches()):
            if options.json:
                write_json(generator, prompts, sys.stdout)
            else:
                sys.stdout.write("\n" * (n > 0))
                write_text(generator, prompts, sys.stdout, with_prompt=True)
    except SystemExit as interrupted:
        code = interrupted.code
    if generator.engine.times.batches:
        say(generator.summary())
    return code


if __name__ == "__main__":
    with_huge_pages()
    run_verb(main)
