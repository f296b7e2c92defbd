"""Write a tokenizer as files of Hugging Face: stock transformers then makes the same tokens.

The result is always a `tokenizer.json`, which states all that is done to a text, and a
`tokenizer_config.json` that adds nothing to it. Transformers' own import of a SentencePiece model
drops the spaces at the start of a text.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llamajax.tokenizers.byte_level import BYTE_LETTERS
from llamajax.tokenizers.safe_cuts import LLAMA3_WORDS
from llamajax.tokenizers.special_tokens import ModelIds, copy_companions, write_model_ids
from llamajax.tokenizers.tokenizer import Tokenizer

_SPACE = "\u2581"


def export_tokenizer(
    tokenizer: Tokenizer, directory: Path, *, max_length: int | None = None
) -> list[str]:
    """Write the files from which transformers loads this tokenizer; return warnings.

    max_length: tokens that the model takes; written as `model_max_length`. A tokenizer.json is
    copied, unless it lacks the BOS that texts of old data begin with.
    """
    if tokenizer.file is not None:
        copy_companions(tokenizer.file, directory)
    ids = ModelIds(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.facts.model.pad_id)
    write_model_ids(directory, ids)
    kind, warnings, spec = "PreTrainedTokenizerFast", [], None
    if tokenizer.kind == "huggingface":
        shutil.copyfile(tokenizer.file, directory / "tokenizer.json")
        if tokenizer.start_ids:
            found = tokenizers.Tokenizer.from_file(str(tokenizer.file))
            spec = found if found.encode("a").ids[:1] != [tokenizer.bos_id] else None
    elif tokenizer.kind == "sentencepiece":
        shutil.copyfile(tokenizer.file, directory / "tokenizer.model")
        spec = _sentencepiece_spec(tokenizer)
        if spec is None:
            kind = "LlamaTokenizer"
            warnings.append(
                f"{tokenizer.file} is not a BPE without normalization: it is exported as "
                "it is, and transformers may split texts in another way"
            )
        elif set(tokenizer.facts.added) - set(tokenizer.control_ids):
            warnings.append(
                "transformers puts a space before text that follows an added token: the tokens "
                "there differ"
            )
    else:
        spec = _byte_level_spec(tokenizer)
    if spec is not None:
        if tokenizer.start_ids:  # before every text, as the Llamas were trained
            begin_with(spec, tokenizer.bos_id)
        spec.save(str(directory / "tokenizer.json"))
    _write_config(tokenizer, directory, kind=kind, max_length=max_length)
    return warnings


def _write_config(
    tokenizer: Tokenizer, directory: Path, *, kind: str, max_length: int | None
) -> None:
    """Write `tokenizer_config.json`; keep what a file of that name states about other things."""
    names = {i: name for name, i in tokenizer.control_ids.items()}

    def name_of(token_id: int | None) -> str | None:
        if token_id is None or token_id in names:
            return names.get(token_id)
        spec = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        return spec.id_to_token(token_id)

    file = directory / "tokenizer_config.json"
    given: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    ours = {
        "tokenizer_class": kind,
        "bos_token": name_of(tokenizer.bos_id),
        "eos_token": name_of(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
    }
    settings = ours | given if tokenizer.kind == "huggingface" else given | ours
    settings |= {} if max_length is None else {"model_max_length": max_length}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _sentencepiece_spec(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """Return the BPE of a SentencePiece model; None for one that normalizes or is no BPE.

    SentencePiece merges the neighbors that give the piece of the highest score. A merge for each
    cut of a piece in two, the best piece's first, does the same.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(tokenizer.file.read_bytes())
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, proto.ModelProto
    normalizes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if trainer.model_type != proto.TrainerSpec.BPE or normalizes:
        return None
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    normal = {p.piece: p.score for p in model.pieces if p.type == kinds.SentencePiece.NORMAL}
    spec = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(sorted(normal, key=lambda piece: (-normal[piece], vocab[piece]))),
            unk_token=model.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    before = [normalizers.Prepend(_SPACE)] if normalizer.add_dummy_prefix else []
    spec.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    spec.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    special = (kinds.SentencePiece.CONTROL, kinds.SentencePiece.UNKNOWN)
    added = [
        (p.piece, p.type in special)
        for p in model.pieces
        if p.type in (*special, kinds.SentencePiece.USER_DEFINED)
    ]
    more = sorted((i, name, special) for name, (i, special) in tokenizer.facts.added.items())
    added += [
        (name, special or name in tokenizer.control_ids)
        for i, name, special in more
        if i >= len(model.pieces)
    ]
    _add_tokens(spec, added)
    return spec


def _byte_level_spec(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of tiktoken ranks, or of the 256 bytes alone.

    tiktoken merges the neighbors that give the lowest rank: a merge for each cut of a token in two,
    in the order of ranks. A word that is a token is taken whole (`ignore_merges`).
    """
    words, ranks = [], {bytes([b]): b for b in range(256)}
    control = {i: name for name, i in tokenizer.control_ids.items()}
    if tokenizer.kind == "tiktoken":
        ranks = tokenizer.ranks
        words = [split_into_words()]
        # Llama 3 numbers those without a use.
        unused = [i for i in range(len(ranks), tokenizer.vocab_size) if i not in control]
        control |= {i: f"<|reserved_special_token_{n}|>" for n, i in enumerate(unused)}
    vocab = {"".join(BYTE_LETTERS[b] for b in token): ranks[token] for token in ranks}
    merges = _merges(sorted(vocab, key=vocab.__getitem__))
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
    return byte_level(model, words, [(control[i], True) for i in sorted(control)], use_regex=False)


def byte_level(
    model: models.BPE, words: Sequence[Any], added: Sequence[tuple[str, bool]], *, use_regex: bool
) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer. words: what splits a text first; use_regex: into GPT 2's."""
    spec = tokenizers.Tokenizer(model)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    spec.pre_tokenizer = pre_tokenizers.Sequence([*words, as_bytes])
    spec.decoder = decoders.ByteLevel()
    _add_tokens(spec, added)
    return spec


def split_into_words() -> Any:
    """Return what splits a text as Llama 3's tokenizer does."""
    return pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), behavior="isolated")


def begin_with(spec: tokenizers.Tokenizer, bos_id: int) -> None:
    """Make every text begin with BOS, also the second of a pair."""
    bos = spec.id_to_token(bos_id)
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
    before = [] if spec.post_processor is None else [spec.post_processor]
    spec.post_processor = processors.Sequence([*before, template]) if before else template


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Return every cut of a piece into two others, in the order of `pieces`."""
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _add_tokens(spec: tokenizers.Tokenizer, tokens: Sequence[tuple[str, bool]]) -> None:
    """Add tokens by name, each with whether it is special."""
    spec.add_tokens([tokenizers.AddedToken(n, special=s, normalized=False) for n, s in tokens])
