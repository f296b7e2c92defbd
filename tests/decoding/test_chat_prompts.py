"""A prompt as the user's message of a chat."""

import pytest

from llamajax.data import load_tokenizer
from llamajax.decoding.generate_options import GenerateOptions
from llamajax.decoding.prompts import text_ids
from llamajax.errors import UserError


def test_a_prompt_stands_where_training_had_the_users_message():
    tokenizer = load_tokenizer("byte")
    plain = text_ids("Who?", tokenizer, "none")
    assert plain == [tokenizer.bos_id, *b"Who?"]
    chat = text_ids("Who?", tokenizer, "llama2")
    assert chat == [tokenizer.bos_id, *b"[INST] Who? [/INST]"]


def test_a_template_whose_tokens_are_missing_is_refused():
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        text_ids("Who?", load_tokenizer("byte"), "chatml")


def test_token_ids_take_no_template():
    flags = GenerateOptions(checkpoint="x", prompt_ids=(1,), chat_template="llama2")
    assert next(flags.problems()).startswith("--chat_template is for texts")
