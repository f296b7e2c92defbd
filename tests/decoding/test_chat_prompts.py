"""A prompt as the user's message of a chat."""

import pytest

from llamajax.config.schema import BackendConfig
from llamajax.data import load_tokenizer
from llamajax.decoding.generate_options import GenerateOptions, Sampling, check_options
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
    request = GenerateOptions(
        checkpoint="x",
        backend=BackendConfig(),
        sampling=Sampling(temperature=0.0),
        seed=0,
        batch_size=1,
        prompt_ids=(1,),
        chat_template="llama2",
    )
    with pytest.raises(UserError, match="--chat_template is for texts"):
        check_options(request)
