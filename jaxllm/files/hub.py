"""The Hugging Face Hub: names of models and data sets, their files in the local cache, and what a model consists of."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxllm.core.errors import UserError
from jaxllm.files import remote
from jaxllm.files.file_systems import public

GENERATION_CONFIG = "generation_config.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

_DESCRIBED = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)
_BARE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
_URL = re.compile(
    r"hf://(?P<kind>datasets/|models/|)(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.%-]+))?(/(?P<inside>.*))?"
)
_SNAPSHOT = re.compile(
    r".*/(?P<kind>dataset|model)s--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<inside>/.*)?"
)
_WEIGHTS = re.compile(r"model(-\d{5}-of-(?P<count>\d{5}))?\.safetensors|model\.safetensors\.index\.json")

Choose = Callable[[Sequence[str], Callable[[str], str]], Sequence[str]]
"""`(files of a repository, text of one of them) → those that are needed`; raises UserError when one is lacking."""


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub. inside: a path or a glob in it; empty for all of it."""

    kind: Literal["model", "dataset"]
    repo: str
    revision: str | None = None
    inside: str = ""

    @classmethod
    def parse(cls, text: str, kind: Literal["model", "dataset"]) -> "HubName | None":
        """The name in `owner/name[@revision]`, `hf://owner/name…` or `hf://datasets/owner/name[@revision][/inside]`.

        None for anything else. Raises UserError when a URL is none of these, or names the other kind.
        """
        if not text.startswith("hf://"):
            bare = _BARE.fullmatch(text)
            return cls(kind, bare["repo"], bare["revision"]) if bare else None
        url = _URL.fullmatch(text)
        prefix = "datasets/" if kind == "dataset" else ""
        if url is None or (url["kind"] == "datasets/") != (kind == "dataset"):
            raise UserError(f"{text!r} does not name a {kind} of the Hub; write hf://{prefix}owner/name[@revision]")
        revision = url["revision"] and url["revision"].replace("%2F", "/")
        return cls(kind, url["repo"], revision, (url["inside"] or "").strip("/"))

    def __str__(self) -> str:
        return f"the Hub {self.kind} {self.repo}" + (f"@{self.revision}" if self.revision else "")


def shown(path: str | os.PathLike[str]) -> str:
    """A path for people: of a file in the Hub's cache its name and revision, `hf://owner/name@1a2b3c4/model.safetensors`;
    of a copy of a remote file its URL."""
    path = os.fspath(path)
    found = _SNAPSHOT.fullmatch(path)
    return remote.shown(path) if found is None else f"{_url(found)}@{found['commit'][:7]}{found['inside'] or ''}"


def pinned(path: str | os.PathLike[str]) -> str | None:
    """The name, with its commit, of the snapshot that a path is in: `hf://owner/name@<40 digits>`; None elsewhere."""
    found = _SNAPSHOT.fullmatch(os.fspath(path))
    return None if found is None else f"{_url(found)}@{found['commit']}"


def _url(found: re.Match[str]) -> str:
    prefix = "datasets/" if found["kind"] == "dataset" else ""
    return f"hf://{prefix}{found['owner']}/{found['name']}"


def fetch(name: HubName, choose: Choose) -> tuple[Path, list[str]]:
    """The folder of the newest snapshot of a repository that is in the cache, and the files of it that `choose` chose.

    What is cached is taken as it is, without asking the Hub. If `choose` lacks something there, the revision is looked
    up on the Hub and the chosen files are downloaded. Raises UserError when that cannot be done, with what to do.
    """
    lacking = None
    if (folder := _cached(name)) is not None:
        try:
            return folder, list(choose(_files_in(folder), lambda file: _text(folder / file)))
        except UserError as error:
            lacking = error
    return _download(name, choose, lacking)


def model_folder(path: str | os.PathLike[str], what: Literal["weights", "config", "tokenizer"]) -> Path:
    """The folder that `path` names: itself, or if there is none the snapshot of the Hub's model of that name. Of a URL
    it is a copy of that folder.

    what: the files that are needed there. Weights are safetensors; code and pickles are never fetched.
    """
    if os.path.exists(path):
        return Path(path)
    if remote.is_url(path):
        url = os.fspath(path).rstrip("/") + "/"
        files = remote.find(url, deep=False).files
        model = [file for name, file in files.items() if name in _DESCRIBED or _WEIGHTS.fullmatch(name)]
        return remote.copy([files[name] for name in _needed(public(url), what, files)], folder=model)[0].parent
    name = HubName.parse(os.fspath(path), "model")
    if name is None:
        return Path(path)
    if name.inside:
        raise UserError(f"{os.fspath(path)!r} names a part of {name}; give the whole: {name.repo}")

    return fetch(name, lambda files, _: _needed(name, what, files))[0]


def _needed(name: object, what: Literal["weights", "config", "tokenizer"], files: Iterable[str]) -> list[str]:
    """Which of the files of the model `name` are needed. Raises UserError when one is lacking."""
    weights = [file for file in files if _WEIGHTS.fullmatch(file)]
    described = [file for file in files if file in _DESCRIBED]
    if what == "tokenizer" and not {*described} & {"tokenizer.json", "vocab.json", "tokenizer.model"}:
        raise UserError(f"{name} holds no tokenizer")
    if what != "tokenizer" and "config.json" not in described:
        raise UserError(f"{name} holds no config.json, so it is no model of transformers")
    if what != "weights":
        return described
    shards = [match["count"] for file in weights if (match := _WEIGHTS.fullmatch(file)) and match["count"]]
    if "model.safetensors" not in weights and not (shards and len(shards) == int(shards[0])):
        raise UserError(f"{name} has not all of its weights as safetensors (found: {', '.join(weights) or 'none'})")
    return described + weights


def _files_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _cached(name: HubName) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Of no file, so that any snapshot will do.
        folder = snapshot_download(
            name.repo, repo_type=name.kind, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _download(name: HubName, choose: Choose, lacking: UserError | None) -> tuple[Path, list[str]]:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    def take(files: list[str]) -> Path:
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(name.repo, repo_type=name.kind, revision=name.revision, allow_patterns=patterns))

    try:
        look_up = HfApi().dataset_info if name.kind == "dataset" else HfApi().model_info
        info = look_up(name.repo, revision=name.revision, timeout=20)
        files = sorted(file.rfilename for file in info.siblings or ())
        chosen = list(choose(files, lambda file: _text(take([file]) / file) if file in files else ""))
        folder = take(chosen)
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{_page(name)} and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} does not exist, or is not for you to see, and there is no file or folder of that name here: check "
            "the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: the Hub has no such revision; give a branch, a tag or a commit") from error
    except Exception as error:  # each layer below raises its own: no network, no name server, a broken connection …
        if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | ConnectionError) and error.errno:
            raise  # the cache's disk
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        cache = "is not in the cache" if lacking is None else f"is not whole in the cache ({lacking})"
        raise UserError(
            f"{name} {cache}, there is no file or folder of that name here, and {constants.ENDPOINT} cannot be asked "
            f"({reason}). The cache is {constants.HF_HUB_CACHE}; where there is a network, fetch it by "
            f"`{_command(name)}`, or give the path of a copy"
        ) from error
    return folder, chosen


def _page(name: HubName) -> str:
    return f"datasets/{name.repo}" if name.kind == "dataset" else name.repo


def _command(name: HubName) -> str:
    kind = " --repo-type dataset" if name.kind == "dataset" else ""
    revision = f" --revision {name.revision}" if name.revision else ""
    return f"hf download {name.repo}{kind}{revision}"
