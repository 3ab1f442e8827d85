"""Tokenizers on disk: training one, and loading one.

A trained tokenizer is a SentencePiece BPE model and the same tokenizer in Hugging Face's form. Both give the
same ids for every text, and the ids of every text decode to exactly that text.
"""

import importlib
import io
import itertools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL_TOKENS = {
    "unk_token": "<|unknown|>",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|padding|>",
}
_META_SPACE = "\u2581"


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face folder, from local files alone and without running code of the folder.

    Raises UserError if the folder is missing, holds no tokenizer, or holds one that transformers cannot read
    or has only in Python.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"the tokenizer folder {folder} {problem}; give the folder that holds tokenizer.json")
    present = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= present:
        # transformers 5 makes a tokenizer of tokenizer.model alone too, but one that gives other ids.
        problem = (
            "has a tokenizer.model alone, which transformers does not read faithfully"
            if "tokenizer.model" in present
            else "holds no tokenizer"
        )
        raise UserError(f"the folder {folder} {problem}; it needs tokenizer.json, or vocab.json and merges.txt")
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a plain Exception
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({reason}); "
            "fetch its files anew, or save it with transformers as a fast tokenizer (tokenizer.json)"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, which transformers has only in "
            "Python; convert it to a fast one (tokenizer.json)"
        )
    return tokenizer


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Trains a BPE tokenizer on `texts` and writes it into `folder`, for SentencePiece and for transformers.

    Nothing in a text is normalized: spaces, tabs, line ends and control characters stay as they are. Newline
    and tab are pieces of their own, runs of spaces are pieces, digits stay single, and a character without a
    piece is spelled in UTF-8 bytes. The transformers tokenizer puts BOS in front and no EOS behind. It reads
    the spelling of a special token in a text as plain text (`split_special_tokens`), as SentencePiece does; a
    chat template, which writes special tokens into the text, needs `"split_special_tokens": false` in
    tokenizer_config.json.

    The same texts give the same bytes. Raises UserError when the texts cannot fill `vocab_size` pieces, or
    when the bytes and characters alone exceed it.
    """
    # The classes of a protobuf module are made when it is imported, out of a type checker's sight.
    protobuf: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto.FromString(_train_sentencepiece(texts, vocab_size))
    # Training needs the spaces written as U+2581, which would decode a U+2581 of the text to a space. With
    # plain spaces in the pieces, U+2581 is a character without a piece, and its bytes decode to itself.
    model.normalizer_spec.escape_whitespaces = False
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_META_SPACE, " ")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString(deterministic=True))
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    (folder / "tokenizer.json").write_text(_hugging_face_json(vocabulary, scores), encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one name that transformers 4 and 5 both know
        **_SPECIAL_TOKENS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", _SPECIAL_TOKENS),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,  # else `__init__` and `self.` could be no pieces
            split_digits=True,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=_SPECIAL_TOKENS["unk_token"],
            bos_piece=_SPECIAL_TOKENS["bos_token"],
            eos_piece=_SPECIAL_TOKENS["eos_token"],
            pad_piece=_SPECIAL_TOKENS["pad_token"],
            max_sentence_length=1 << 30,  # bytes; a longer line would be left out
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # What SentencePiece says is "INTERNAL: file(line) [condition] reason", and the reason may end with an
        # option that we do not have.
        reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0].strip()
        reason = reason or "There is no text."
        raise UserError(f"cannot train a tokenizer with vocab_size {vocab_size} on this text. {reason}") from error
    return model.getvalue()


def _hugging_face_json(vocabulary: dict[str, int], scores: dict[str, float]) -> str:
    """The tokenizer.json that does what SentencePiece does with pieces of these scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    by_score = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    merges = [halves for piece in by_score if (halves := _halves(piece, scores))]
    unknown, bos = _SPECIAL_TOKENS["unk_token"], _SPECIAL_TOKENS["bos_token"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token=unknown))
    # No piece holds a newline and something else, so this changes no id, and lines fit the cache.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL_TOKENS.values()])
    return tokenizer.to_str(pretty=True)


def _halves(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two pieces that SentencePiece joins last when it reads `piece`; None if it never arrives there.

    SentencePiece joins neighbours into the piece of the highest score, the leftmost first. Hugging Face ranks
    pairs instead, and two pairs that make one piece would need a rank that SentencePiece does not give. But
    joining is local: in any text a piece comes about by the joins that it takes alone. So one pair a piece is
    enough, and the ids are SentencePiece's for every text.
    """
    symbols, halves = list(piece), None
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = max(range(len(pairs)), key=lambda i: scores.get("".join(pairs[i]), float("-inf")))
        halves = pairs[best]
        if "".join(halves) not in scores:
            return None
        symbols[best : best + 2] = ["".join(halves)]
    return halves
