"""The files beside the weights of a model that go along as they are: its tokenizer's, and how it is sampled."""

import base64
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from jaxllm.core.console import note
from jaxllm.core.errors import UserError
from jaxllm.files.hub import GENERATION_CONFIG, TOKENIZER_FILES

SIDE_FILES = (GENERATION_CONFIG, *TOKENIZER_FILES)

_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # the hash by which git or git-lfs knows a file
_OWN_COPY = "if it belongs to the model, put a copy of the file itself there"


def read_side_files(folder: str | Path, names: Iterable[str] = SIDE_FILES) -> dict[str, bytes]:
    """The content of each file of `names` that is in `folder`; it must be what the name says.

    A link out of the folder is left out, with a note: a model that somebody else made must not take a file of the user
    along. Raises UserError for a file that is cut, empty or of another kind, so that no copy of it is made.
    """
    found: dict[str, bytes] = {}
    for path in (Path(folder) / name for name in names):
        if (target := link_out(path)) is not None:
            note(f"{path}: is not copied, for it is a link out of its folder, to {target}; {_OWN_COPY}")
            continue
        if not path.exists():
            if path.is_symlink():
                note(f"{path}: is not copied, for it is a link to nothing; remove it, or put the file itself there")
            continue
        try:
            found[path.name] = path.read_bytes()
            _check(path.name, found[path.name])
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy or download it again") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: is damaged, and is not copied ({error}); copy or download it again, or remove it if the "
                "model does without"
            ) from error
    return found


def check_kept(folder: Path) -> None:
    """Raises UserError for a file of a tokenizer that a run would train with, and could not keep."""
    for path in (folder / name for name in TOKENIZER_FILES if name != "tokenizer.model"):  # which nothing here reads
        if (target := link_out(path)) is not None:
            raise UserError(
                f"{path}: is a link out of its folder, to {target}. Such a file is not copied into the run, which "
                f"would lack what it was trained with; {_OWN_COPY}"
            )


def link_out(path: Path) -> Path | None:
    """Where `path` leads, if it is a link out of its folder; None for what is in the folder.

    The cache of the Hub keeps the files of a snapshot as links to its own blobs: these count as in the folder.
    """
    if not path.is_symlink():
        return None
    folder, target = path.parent.resolve(), Path(os.path.realpath(path))
    if folder in target.parents:
        return None
    snapshot = next((inner for inner in (folder, *folder.parents) if inner.parent.name == "snapshots"), None)
    is_blob = (
        snapshot is not None and target.parent == snapshot.parent.parent / "blobs" and _BLOB.fullmatch(target.name)
    )
    return None if is_blob else target


def _check(name: str, content: bytes) -> None:
    """Raises ValueError or RecursionError unless `content` is what a file of this name holds."""
    if not content:
        raise ValueError("it is empty")
    if name == "tokenizer.model":
        _check_pieces(content)
        return
    text = content.decode()
    if name.endswith(".json"):
        _check_object(text)
    if name == "tokenizer.json":
        _check_tokenizer(text)
    elif name == "chat_template.jinja":
        _check_template(text)
    elif name == "merges.txt":
        _check_merges(text)


def _check_object(text: str) -> None:
    content: Any = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a JSON object, not a {type(content).__name__}")


def _check_tokenizer(text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # it raises nothing narrower
        raise ValueError(f"it is no tokenizer: {error}") from error


def _check_pieces(content: bytes) -> None:
    """A SentencePiece model, or lines of a token in base64 and its rank, as tiktoken has them."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        try:
            for token, _ in (line.split() for line in content.decode().splitlines()):
                base64.b64decode(token, validate=True)
        except ValueError:
            raise ValueError("it is neither a SentencePiece model nor tiktoken's ranks") from error


def _check_template(text: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}`, by which templates mark what an assistant says."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error


def _check_merges(text: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.startswith("#version") and len(line.split(" ")) < 2:
            raise ValueError(f"line {number} is {line[:40]!r}, which are no two tokens")
