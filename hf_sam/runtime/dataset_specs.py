"""Load a dataset from its spec: a file, a glob pattern, a folder, or a dataset on the Hub."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}


def parse_spec(spec: str) -> tuple[str, str]:
    """Split `[NAME=]PLACE` into name and place; without `NAME=`, the name is the last part of the path."""
    match = re.match(r"([\w .-]+)=(.+)", spec)
    if match and not os.path.exists(spec):
        return match[1], match[2]
    path = Path(spec)
    return (path.stem if path.is_file() else path.name) or spec, spec


def open_split(
    place: str,
    split: str | None = None,
    *,
    streaming: bool = False,
    preferred: Sequence[str] = ("test", "validation", "train"),
):
    """Load one split of the dataset at `place`.

    Args:
        place (`str`): a file (.jsonl, .json, .csv, .parquet, also compressed; .txt, where a blank line ends a
            document), a glob pattern of such files (`data/*.jsonl.zst`), a folder, or
            `HUB/ID[/FOLDER][:CONFIG][@REVISION]`.
        split (`str`, *optional*): the split. When omitted, the first of `preferred` that exists.
        streaming (`bool`): stream the data instead of loading it first.
        preferred (`Sequence[str]`): splits to try when `split` is omitted.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the split.

    Raises:
        ValueError: if the data or the split does not exist, or a file is empty.
    """
    splits = open_splits(place, streaming=streaming)
    for choice in [split] if split else [*preferred, *splits]:
        if choice in splits:
            return splits[choice]
    raise ValueError(f"it has no split {split!r}, only {', '.join(splits)}.")


def open_splits(place: str, *, config: str | None = None, streaming: bool = False) -> dict:
    """Load all splits of the dataset at `place`.

    Args:
        place (`str`): see [`open_split`].
        config (`str`, *optional*): the dataset configuration, if `place` does not contain one.
        streaming (`bool`): stream the data instead of loading it first.

    Returns:
        `dict[str, datasets.Dataset | datasets.IterableDataset]`: splits by name. A file, a glob pattern and a dataset
        saved without splits become the split `train`.

    Raises:
        ValueError: if the data does not exist, or a file is empty.
    """
    import datasets

    path, options = place, {}
    if files := data_files(place):
        path, options = loader_of(files, place)
    elif not os.path.isdir(place):
        path, named_config, options = _hub_parts(place)
        config = named_config or config
        if _looks_like_file(place):
            raise ValueError("it cannot be loaded: there is no such file or folder. Check the path.")
    try:
        if is_saved(place):
            splits = datasets.load_from_disk(place)
            if streaming:
                splits = _as_streams(splits)
        else:
            splits = datasets.load_dataset(path, config, streaming=streaming, **options)
    except Exception as error:  # `datasets` raises a dozen different types
        where = "" if is_local(place) else "there is no such file or folder here, and the Hub returned "
        raise ValueError(f"it cannot be loaded: {where}{type(error).__name__}: {error}") from error
    return {"train": splits} if isinstance(splits, datasets.Dataset | datasets.IterableDataset) else splits


def is_saved(place: str) -> bool:
    """Whether `place` is a folder written by `save_to_disk`."""
    return os.path.isdir(place) and any((Path(place) / f).exists() for f in ("state.json", "dataset_dict.json"))


def is_local(place: str) -> bool:
    """Whether `place` is an existing file or folder, or a pattern that matches files."""
    return os.path.isdir(place) or bool(data_files(place))


def _looks_like_file(place: str) -> bool:
    """Whether `place` can only be a path: Hub ids neither start nor end like this."""
    suffixes = [suffix for suffix in Path(place).suffixes if suffix not in _COMPRESSED]
    return place.startswith(("/", "./", "../", "~")) or "*" in place or bool(suffixes and suffixes[-1] in _KINDS)


def data_files(place: str) -> list[str]:
    """The files that match a path or a pattern, sorted; empty for a folder or a dataset on the Hub."""
    if os.path.isfile(place):
        return [place]
    return sorted(path for path in glob.glob(place, recursive=True) if os.path.isfile(path)) if "*" in place else []


def local_files(spec: str) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the files of a local dataset; empty for a dataset on the Hub, which has revisions.

    Args:
        spec (`str`): `[NAME=]PLACE`, see [`open_split`].
    """
    place = parse_spec(spec)[1]
    paths = data_files(place)
    if os.path.isdir(place):
        paths = sorted(str(path) for path in Path(place).rglob("*") if path.is_file() and is_data(path))
    return [(os.path.basename(path), os.path.getsize(path)) for path in paths]


def is_data(path: Path) -> bool:
    """Whether a file in a folder holds data, not the metadata or caches of `datasets`."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    known = suffixes and suffixes[-1] in {*_KINDS, ".arrow"}
    return bool(known) and not path.name.startswith((".", "cache-", "tmp", "dataset_info", "dataset_dict", "state."))


def loader_of(files: list[str], place: str) -> tuple[str, dict]:
    """Choose the loader of `datasets` for some files; returns its name and options.

    Raises:
        ValueError: if a file is empty or its type is unknown, or the files have different types.
    """
    kinds = set()
    for file in files:
        suffixes = [suffix for suffix in Path(file).suffixes if suffix not in _COMPRESSED]
        suffix = suffixes[-1] if suffixes else ""
        if suffix not in _KINDS:
            raise ValueError(f"files end in one of {', '.join(_KINDS)}, not in {suffix!r}.")
        if not os.path.getsize(file):
            raise ValueError("the file is empty." if file == place else f"the file {file} is empty.")
        kinds.add(_KINDS[suffix])
    if len(kinds) > 1:
        raise ValueError(f"its files have different types: {', '.join(sorted(kinds))}.")
    (kind,) = kinds
    options = {"data_files": files}
    if kind == "text":
        options["sample_by"] = "paragraph"
    return kind, options


def _as_streams(splits):
    import datasets

    if isinstance(splits, datasets.Dataset):
        return splits.to_iterable_dataset()
    return {name: split.to_iterable_dataset() for name, split in splits.items()}


def _hub_parts(place: str) -> tuple[str, str | None, dict]:
    """Split `HUB/ID[/FOLDER][:CONFIG][@REVISION]` into id, configuration and options of `load_dataset`."""
    path, _, revision = place.partition("@")
    path, _, config = path.partition(":")
    owner, *rest = path.split("/")
    options = {"revision": revision or None}
    if len(rest) > 1 and owner not in ("", ".", "..", "~"):
        path, options["data_dir"] = "/".join([owner, rest[0]]), "/".join(rest[1:])
    return path, config or None, options
