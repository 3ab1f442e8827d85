"""Which files of a folder or of a Hub data set are meant: by suffix, split, subset, and what its README says."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.files.compressed import Suffix

README = "README.md"

# Split → the words that tell it in names of files and folders, as Hugging Face's `datasets` has them.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?=\D|$)")
# Beside the data of a data set; they have suffixes of data files.
_SIDE_FILES = {
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "requirements.txt",
    README,
}


@dataclass(frozen=True)
class Choice:
    """What a user asks for; `where` is how to call the folder or data set in a message."""

    where: str
    split: str | None = None
    subset: str | None = None


def choose(names: Iterable[str], readme: str, wanted: Choice) -> list[str]:
    """The files to read, sorted, of a folder that holds the files `names` (with / between folders).

    The `configs` of the front matter of `readme` decide where there are any; else the names do. Without `split`, train
    is taken if there is more than one. Raises UserError when that leaves it open which files are meant, naming the
    choices, or when a shard is missing.
    """
    data = sorted(name for name in names if _is_data(name))
    subsets = _subsets(readme)
    chosen = _by_readme(data, subsets, wanted) if subsets else _by_names(data, wanted)
    _check_one_kind(chosen, wanted)
    _check_all_shards(chosen, wanted)
    return chosen


def is_side(name: str) -> bool:
    """Whether a file of a folder is hidden, or describes the data beside it and is none itself."""
    *folders, file = name.split("/")
    return file in _SIDE_FILES or any(part.startswith(".") for part in (*folders, file))


def _is_data(name: str) -> bool:
    return Suffix.of(name).kind is not None and not is_side(name)


def pick(what: str, groups: dict[str, Any], asked: str | None, default: str, where: str) -> str:
    """The name in `groups` that is meant."""
    listed = ", ".join(groups)
    if asked is not None:
        if asked not in groups:
            raise UserError(f"{where} has no {what} {asked!r}.{did_you_mean(asked, groups)} It has: {listed}.")
        return asked
    if default not in groups and len(groups) > 1:
        raise UserError(f"{where} has the {what}s {listed}; choose one, such as `{what}: {next(iter(groups))}`")
    return default if default in groups else next(iter(groups))


def _by_readme(data: Sequence[str], subsets: dict[str, dict[str, list[str]]], wanted: Choice) -> list[str]:
    subset = pick("subset", subsets, wanted.subset, "default", wanted.where)
    splits = subsets[subset]
    split = pick("split", splits, wanted.split, "train", wanted.where)
    chosen = [name for name in data if any(_matches(name, pattern) for pattern in splits[split])]
    if not chosen:
        raise UserError(
            f"{wanted.where} has no data file for split {split!r}, which its {README} places in "
            f"{', '.join(splits[split])}"
        )
    return chosen


def _subsets(readme: str) -> dict[str, dict[str, list[str]]]:
    """Subset → split → patterns of files, of the `configs` in the front matter of a data set's README."""
    front = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    try:
        card = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that there is not is a ValueError
        card = None
    configs = card.get("configs") if isinstance(card, dict) else None
    found: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict) and (files := config.get("data_files")):
            name = "default" if config.get("default") else str(config.get("config_name", "default"))
            found[name] = _patterns(files, config.get("data_dir"))
    return found


def _patterns(files: Any, folder: str | None) -> dict[str, list[str]]:
    """`data_files` in each of its forms: a pattern, a list of them, or a list of `{split, path}`."""
    splits: defaultdict[str, list[str]] = defaultdict(list)
    for item in files if isinstance(files, list) else [files]:
        split, paths = (item.get("split", "train"), item["path"]) if isinstance(item, dict) else ("train", item)
        for path in paths if isinstance(paths, list) else [paths]:
            splits[str(split)].append(f"{folder.strip('/')}/{path}" if folder else str(path))
    return dict(splits)


def _matches(name: str, pattern: str) -> bool:
    deep = "**" in pattern or name.count("/") == pattern.count("/")
    return deep and fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))


def _by_names(data: Sequence[str], wanted: Choice) -> list[str]:
    if wanted.subset is not None:  # a folder of the same name
        folders = {name.partition("/")[0]: None for name in data if "/" in name}
        chosen = pick("subset", folders, wanted.subset, wanted.subset, wanted.where)
        data = [name for name in data if name.startswith(f"{chosen}/")]
    if not data:
        raise UserError(f"{wanted.where} holds no data file; name a glob, such as **/*.py with `format: text`")
    splits: defaultdict[str, list[str]] = defaultdict(list)
    for name in data:
        splits[_split_of(name)].append(name)
    if wanted.split is None and "" in splits and len(splits) > 1:
        told = ", ".join(filter(None, splits))
        raise UserError(
            f"{wanted.where} holds files of the splits {told}, and others such as {splits[''][0]}; choose by `split:`, "
            "or name the files by a glob"
        )
    chosen = splits[pick("split", splits, wanted.split, "train", wanted.where)]
    folders = sorted({"/".join(part for part in name.split("/")[:-1] if not _split_in(part)) for name in chosen})
    if len(folders) > 1:
        raise UserError(
            f"{wanted.where} holds data files in {len(folders)} folders ({', '.join(f or '.' for f in folders[:5])}); "
            f"choose one by `subset: {folders[-1].partition('/')[0]}`, or name files by a glob such as **/*"
            f"{_suffix(chosen[0])}"
        )
    return chosen


def _suffix(name: str) -> str:
    """`data/train.jsonl.gz` → `.jsonl.gz`"""
    return re.sub(r"^.*?(?=(\.\w+)(\.gz|\.zst)?$)", "", name.rpartition("/")[2])


def _split_of(name: str) -> str:
    """The split that a file is of by its name: `data/train_sft-00000-of-00003.parquet`, `val.jsonl`, `test/0.csv`."""
    *folders, file = name.split("/")
    shard = _SHARD.match(file)
    if shard and shard["name"] != "data":
        return _split_in(shard["name"]) if shard["name"] in sum(_WORDS.values(), ()) else shard["name"]
    return next((split for part in (file, *reversed(folders)) if (split := _split_in(part))), "")


def _split_in(word: str) -> str:
    for split, words in _WORDS.items():
        if re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", word.lower()):
            return split
    return ""


def _check_one_kind(chosen: Sequence[str], wanted: Choice) -> None:
    by_suffix: defaultdict[object, list[str]] = defaultdict(list)
    for name in chosen:
        by_suffix[Suffix.of(name).kind].append(name)
    if len(by_suffix) > 1:
        found = ", ".join(f"{kind}: {files[0]}" for kind, files in by_suffix.items())
        raise UserError(
            f"{wanted.where} holds data files of several kinds ({found}); name those meant by a glob, such as "
            f"*{_suffix(chosen[0])}"
        )


def _check_all_shards(chosen: Sequence[str], wanted: Choice) -> None:
    shards = [match for name in chosen if (match := _SHARD.match(name))]
    have = {(match["name"], match["count"]): 0 for match in shards}
    for match in shards:
        have[match["name"], match["count"]] += 1
    for (name, count), present in have.items():
        if present < int(count):
            raise UserError(
                f"{wanted.where} has {present} of the {int(count)} files {name}-*-of-{count}; add the others"
            )
