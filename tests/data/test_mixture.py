"""What `open_mixture` refuses, and what its hash depends on."""

import re
import shutil

import pytest

from llamajax.data import has_split, load_tokenizer, open_mixture
from llamajax.errors import UserError


def refused(config, pattern: str, *, split: str = "train", vocab_size: int = 258, **options):
    with pytest.raises(UserError, match=pattern) as caught:
        open_mixture(config, split=split, vocab_size=vocab_size, **options)
    return str(caught.value)


def test_directories_that_are_not_prepared(config, tmp_path, prepared, documents):
    refused(config(tmp_path / "none"), "no such directory")
    refused(config(tmp_path), "not a prepared directory")
    refused(config(), "data.path is empty")
    path = prepared("a", documents)
    refused(config(path, path), "twice")
    manifest = path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    refused(config(path), "damaged")
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 99'))
    refused(config(path), "format version 99")


def test_damaged_shards(config, prepared, documents):
    path = prepared("a", documents)
    shard = next(path.glob("train-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:2000] + bytes(1000) + content[3000:])
    mixture = open_mixture(config(path), split="train", vocab_size=258)
    with pytest.raises(UserError, match=f"{shard.name}: damaged"):
        mixture.sources[0].blocks(range(mixture.sources[0].num_blocks))
    refused(config(path), "checksum", verify=True)
    shard.write_bytes(content[:-1])
    refused(config(path), rf"{len(content) - 1} bytes, the manifest says {len(content)}")
    shard.unlink()
    refused(config(path), re.escape(shard.name) + " is missing")


def test_what_does_not_fit_the_model(config, prepared, documents):
    path = prepared("a", documents)
    refused(config(path), "model.vocab_size = 257: set it to at least 258", vocab_size=257)
    refused(config(path, seq_len=10**6), "data.seq_len = 1000000, plus 1")
    refused(config(path), "no validation split", split="validation")


def test_all_problems_of_a_mixture_at_once(config, prepared, documents):
    text = "the quick brown fox jumps over the lazy dog and runs away " * 30
    a, b = prepared("a", documents), prepared("b", [text], tokenizer="train:300")
    message = refused(config(a, b, weights=(1.0,), seq_len=10**6), "another tokenizer")
    assert message.count("\n  - ") == 5
    refused(config(a, prepared("c", documents[:2]), weights=(1.0, 0.0)), "above 0")


def test_the_hash_depends_on_the_content_and_its_order(opened, prepared, documents, tmp_path):
    def hashes(*paths, **changes):
        return opened(*paths, **changes).hash

    a, b = prepared("a", documents), prepared("b", documents[::-1])
    shutil.copytree(a, tmp_path / "copy")
    assert hashes(a) == hashes(tmp_path / "copy")
    assert hashes(a) == hashes(a, seq_len=7, global_batch_size=1, num_threads=9, weights=(4.0,))
    different = [hashes(a), hashes(b), hashes(a, b), hashes(b, a), hashes(a, b, weights=(1.0, 2.0))]
    different += [hashes(a, seed=12), hashes(a, shuffle=False)]
    assert len(set(different)) == len(different)
    assert hashes(a, b, weights=(1.0, 2.0)) == hashes(a, b, weights=(2.0, 4.0))


def test_the_loss_to_beat_is_weighted_by_tokens(opened, prepared, documents):
    a = prepared("a", documents, "--validation_fraction=0.3")
    b = prepared("b", ["a" * 500, "b" * 50, "a" * 100], "--validation_fraction=0.3")
    parts = [opened(p, split="validation") for p in (a, b)]
    both = opened(a, b, split="validation")
    expected = sum(p.unigram_loss * p.num_tokens for p in parts) / both.num_tokens
    assert both.unigram_loss == pytest.approx(expected)
    assert parts[0].unigram_loss == parts[0].manifests[0]["splits"]["validation"]["unigram_loss"]
    assert opened(a).unigram_loss is None
    assert both.tokenizer_fingerprint == load_tokenizer("byte").fingerprint


def test_paths_without_a_validation_split_leave_the_others_evaluated(config, prepared, documents):
    a = prepared("a", documents, "--validation_fraction=0.3")
    b = prepared("b", ["b" * 300])
    alone = open_mixture(config(a), split="validation", vocab_size=258)
    for weights in ((), (1.0, 2.0)):
        both = config(b, a, weights=weights)
        assert has_split(both, "validation")
        mixture = open_mixture(both, split="validation", vocab_size=258)
        assert [s.path for s in mixture.sources] == [a]
        assert (mixture.weights, mixture.num_tokens) == ((1.0,), alone.num_tokens)
