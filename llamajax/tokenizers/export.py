"""Tokenizers as files of Hugging Face: what stock transformers loads, with the same tokens.

Everything ends in a `tokenizer.json`, which states all that is done to a text, and a
`tokenizer_config.json` that adds nothing to it. transformers' own reading of a bare SentencePiece
model drops spaces that start a text.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llamajax.tokenizers.special_tokens import carry_companions, write_model_ids

if TYPE_CHECKING:
    from llamajax.tokenizers.loading import Tokenizer

_SPACE = "\u2581"


def export(tokenizer: "Tokenizer", directory: Path) -> list[str]:
    """Write into `directory` what transformers makes this tokenizer of; returns warnings."""
    warnings: list[str] = []
    if tokenizer.files:
        carry_companions(tokenizer.files[0], directory)
    stops, pad = tokenizer.stop_ids, tokenizer.facts.pad_id
    write_model_ids(directory, bos_id=tokenizer.bos_id, eos_ids=stops, pad_id=pad)
    match tokenizer.kind:
        case "huggingface":
            shutil.copyfile(tokenizer.files[0], directory / "tokenizer.json")
        case "sentencepiece":
            shutil.copyfile(tokenizer.files[0], directory / "tokenizer.model")
            spec = _sentencepiece(tokenizer)
            if spec is None:
                warnings.append(
                    f"{tokenizer.files[0]} is not a BPE without normalisation: it is exported as "
                    "it is, and transformers may split texts in another way"
                )
                _write_config(tokenizer, directory, kind="LlamaTokenizer")
                return warnings
            if set(tokenizer.facts.added) - set(tokenizer.control_ids):
                warnings.append(
                    "transformers puts a space before text that follows an added token: the tokens "
                    "there differ"
                )
            spec.save(str(directory / "tokenizer.json"))
        case _:
            _byte_level(tokenizer).save(str(directory / "tokenizer.json"))
    _write_config(tokenizer, directory, kind="PreTrainedTokenizerFast")
    return warnings


def _write_config(tokenizer: "Tokenizer", directory: Path, *, kind: str) -> None:
    """`tokenizer_config.json`: what a file of that name already says of other things stays."""
    file = directory / "tokenizer_config.json"
    given: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    ours = {
        "tokenizer_class": kind,
        "bos_token": _piece(tokenizer, directory, tokenizer.bos_id),
        "eos_token": _piece(tokenizer, directory, tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
    }
    settings = ours | given if tokenizer.kind == "huggingface" else given | ours
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _piece(tokenizer: "Tokenizer", directory: Path, token_id: int | None) -> str | None:
    """The name of a control token in the exported files."""
    if token_id is None:
        return None
    named = {i: name for name, i in tokenizer.control_ids.items()}
    if token_id in named:
        return named[token_id]
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).id_to_token(token_id)


def _sentencepiece(tokenizer: "Tokenizer") -> tokenizers.Tokenizer | None:
    """The BPE of a SentencePiece model, or None for one that normalises or is no BPE.

    SentencePiece joins the neighbours that give the piece of the highest score; here a merge for
    each way of cutting a piece in two, the best piece's first, does the same.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(tokenizer.files[0].read_bytes())
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, proto.ModelProto
    bare = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if trainer.model_type != proto.TrainerSpec.BPE or not bare:
        return None
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    normal = {p.piece: p.score for p in model.pieces if p.type == kinds.SentencePiece.NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: (-normal[piece], vocab[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unk = model.pieces[trainer.unk_id].piece
    spec = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=unk,
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
    chosen = (*special, kinds.SentencePiece.USER_DEFINED)
    spec.add_tokens(
        [
            tokenizers.AddedToken(p.piece, special=p.type in special, normalized=False)
            for p in model.pieces
            if p.type in chosen
        ]
    )
    more = sorted((i, name, special) for name, (i, special) in tokenizer.facts.added.items())
    spec.add_tokens(
        [
            tokenizers.AddedToken(
                name, special=special or name in tokenizer.control_ids, normalized=False
            )
            for i, name, special in more
            if i >= len(model.pieces)
        ]
    )
    _start_with(spec, tokenizer.bos_id)
    return spec


def _byte_level(tokenizer: "Tokenizer") -> tokenizers.Tokenizer:
    """The byte-level BPE of tiktoken ranks, or of the 256 bytes alone.

    tiktoken joins the neighbours that give the lowest rank: a merge for each way of cutting a token
    in two, in the order of ranks. A word that is a token is taken whole (`ignore_merges`).
    """
    words, ranks = [], {bytes([b]): b for b in range(256)}
    control = {256: "<s>", 257: "</s>"}
    if tokenizer.kind == "tiktoken":
        ranks = tokenizer.ranks
        words = [pre_tokenizers.Split(tokenizers.Regex(tokenizer.words), behavior="isolated")]
        control = _llama3_control(len(ranks), tokenizer)
    letters = _byte_letters()
    spell = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    merges = [
        (spell(token[:cut]), spell(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spell(token): rank for token, rank in ranks.items()}
    spec = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spec.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_only])
    spec.decoder = decoders.ByteLevel()
    names = [control[i] for i in sorted(control)]
    spec.add_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in names])
    _start_with(spec, tokenizer.bos_id)
    return spec


def _llama3_control(first: int, tokenizer: "Tokenizer") -> dict[int, str]:
    """Names of the control tokens by id; those without a use are numbered, as Llama 3 has them."""
    named = {i: name for name, i in tokenizer.control_ids.items()}
    rest = [i for i in range(first, tokenizer.vocab_size) if i not in named]
    return named | {i: f"<|reserved_special_token_{n}|>" for n, i in enumerate(rest)}


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [letters[b] for b in range(256)]


def _start_with(spec: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Have BOS put before every text, as the Llamas were trained; None: nothing."""
    if bos_id is None:
        return
    bos = spec.id_to_token(bos_id)
    spec.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
