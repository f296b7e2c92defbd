"""PEFT directories: the logits of PEFT, where the base is, and adapters that are not folded in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import stored
from chat_cases import save_byte_level
from llama_cases import ADAPTED, STORED, save_hugging_face, save_peft, tokens, weights
from llamas import assert_close, load, logits
from refusal import refused

from llamajax import convert
from llamajax.decoding.prompts import eos_ids
from llamajax.errors import UserError
from llamajax.formats.weights import open_weights

PLAIN = STORED["plain"]
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def base(tmp_path) -> Path:
    return save_hugging_face(tmp_path / "base", PLAIN, weights(PLAIN))


@pytest.fixture
def adapters(tmp_path, base) -> Path:
    """Free to be damaged."""
    return save_peft(tmp_path / "peft", PLAIN, ADAPTED["plain"], base)


def edit(adapters: Path, **changes: object) -> None:
    file = adapters / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ADAPTED)
def test_logits_equal_pefts(name, base, tmp_path):
    path = save_peft(tmp_path / "peft", PLAIN, ADAPTED[name], base)
    opened = open_weights(path)
    assert (opened.kind, opened.model) == ("peft", PLAIN)
    assert opened.fingerprint() != open_weights(base).fingerprint()
    ours = logits(load(path, fsdp=2, tensor=2), tokens(PLAIN))
    assert_close(ours, stored.arrays("stored")[f"adapted, {name}"])


def test_the_base_is_found_from_here_and_from_the_adapters(adapters, base, tmp_path, monkeypatch):
    for here, named in ((tmp_path, "base"), (base, "../base")):
        monkeypatch.chdir(here)
        edit(adapters, base_model_name_or_path=named)
        assert open_weights(adapters).base.path.samefile(base)
    for named, message in (
        ("meta-llama/Llama-2-7b-hf", r"hf download meta-llama/Llama-2-7b-hf .*base_model_name_or"),
        (str(tmp_path / "gone"), r"no directory .*gone, their base; write the directory"),
        (None, "do not say which base"),
        (5, "is 5; it must be a directory's name"),
        ("x" * 300, "no directory x+, their base"),
        (str(adapters), "leads to .*peft, which holds these adapters"),
    ):
        edit(adapters, base_model_name_or_path=named)
        with pytest.raises(UserError, match=message):
            open_weights(adapters)


@pytest.mark.parametrize("flags", [[], ["--format=gguf"]])
def test_conversion_never_replaces_the_base(flags, adapters, base):
    target = base / "model.safetensors" if flags else base
    with refused("which is read" if flags else "holds what is read", unchanged=(base,)):
        convert.main([f"--from={adapters}", f"--to={target}", "--overwrite", *flags])


def test_the_tokenizer_may_be_beside_the_adapters_and_texts_end_as_the_bases(adapters, base):
    save_byte_level(base / "tokenizer.json", ["<s>", "</s>"])
    (base / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    opened = open_weights(adapters)
    assert opened.tokenizer == base / "tokenizer.json"
    shutil.copy(base / "tokenizer.json", adapters)
    opened = open_weights(adapters)
    assert opened.tokenizer == adapters / "tokenizer.json"
    assert opened.load_tokenizer().stop_ids == (257, 7)
    assert eos_ids(opened.path, opened.load_tokenizer()) == (257, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_dora": True, "bias": "all"},
            r"(?s)merge_and_unload.*use_dora is True.*bias is 'all'",
        ),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; it must be an object"),
        ({"alpha_pattern": {"*q": 8}}, r"alpha_pattern has '\*q', no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        (
            {"r": 4},
            r"layers\.0\.self_attn\.q_proj: A and B have shapes .*, the base needs \[\(4, 64",
        ),
    ],
)
def test_what_cannot_be_folded_in_is_named(adapters, changes, message):
    edit(adapters, **changes)
    with pytest.raises(UserError, match=message):
        open_weights(adapters)


def test_tensors_that_do_not_fit_are_named(adapters, tmp_path):
    file = adapters / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    odd = {
        f"{QUERY}.lora_magnitude_vector": np.zeros(64, np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 9), np.float32),
        "base_model.model.lm_head.weight": np.zeros((5, 64), np.float32),
    }
    alone = {name: a for name, a in arrays.items() if name != f"{QUERY}.lora_B.weight"}
    safetensors.numpy.save_file(alone | odd, file)
    with pytest.raises(UserError) as caught:
        open_weights(adapters)
    for name in ("q_proj.lora_A.weight", "magnitude_vector", "embedding_A", "lm_head.weight"):
        assert f"{name}: shape" in str(caught.value)
    arrays[f"{QUERY}.lora_A.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight holds 1 values that are NaN"):
        open_weights(adapters)
    file.rename(adapters / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        open_weights(adapters)
