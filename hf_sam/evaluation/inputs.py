"""Models and data of an evaluation, checked before anything is measured."""

import dataclasses
import os
from pathlib import PurePath

from ..instruments import HeldOutData
from ..quantizers import QUANTIZERS
from ..quantizers.ready_made import ReadyMade, find_ready_made
from ..runtime.dataset_specs import data_files, open_split, parse_spec
from ..runtime.models import LocalModel
from ..runtime.packages import require


def with_distinct_names(sources: list[LocalModel]) -> list[LocalModel]:
    """The models with distinct names: models with the same name are named by their specs.

    Raises:
        ValueError: if a model is named twice.
    """
    names = [source.name for source in sources]
    sources = [s if names.count(s.name) == 1 else dataclasses.replace(s, name=s.spec) for s in sources]
    names = [source.name for source in sources]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"The model {twice[0]!r} is named twice; give them names: NAME=PATH.")
    return sources


def find_quantized(specs: list[str], models: list[LocalModel]) -> list[ReadyMade]:
    """Models that somebody else quantized, from `[MODEL/]NAME=PATH`; the base, the first of `models`, if omitted.

    Raises:
        ValueError: for an unknown model, two of one name, a name of a scheme, or a model that is not quantized.
    """
    found: list[ReadyMade] = []
    for spec in specs:
        label, equals, place = spec.partition("=")
        if not equals or os.path.exists(spec):
            label, place = PurePath(spec.partition("@")[0]).name.removesuffix(".gguf"), spec
        named, _, scheme = label.rpartition("/")
        known = {model.name: model for model in models}
        model = known.get(named) if named else models[0]
        if model is None:
            raise ValueError(f"--quantized {spec}: there is no model {named!r}, only {', '.join(known)}.")
        if not scheme or scheme in QUANTIZERS:
            raise ValueError(f"--quantized {spec}: {scheme!r} cannot be its name; choose another: NAME=PATH.")
        if any(one.scheme == scheme and one.model is model for one in found):
            raise ValueError(f"--quantized names two models {scheme!r}; give them other names: NAME=PATH.")
        found.append(find_ready_made(scheme, place, model))
    return found


def check_same_shapes(base: LocalModel, tuned: LocalModel) -> None:
    """Raises ValueError if the weights of two models differ in name or shape, so that they cannot be interpolated."""
    first, second = base.shapes(), tuned.shapes()
    if not first or not second:  # not in safetensors; found out when they are loaded
        return
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{base.name!r} and {tuned.name!r} do not have the same weights: {name!r} has shape {first.get(name)} in "
            f"one and {second.get(name)} in the other. --landscape, --similarity and --wise_ft need models of one "
            "architecture; embeddings that were resized for new tokens cannot be interpolated."
        )


def load_held_out(
    spec: str,
    tokenizer,
    *,
    column: str = "text",
    split: str | None = None,
    max_documents: int | None = None,
    max_length: int = 1024,
) -> tuple[str, HeldOutData]:
    """The name and the tokens of the data that `spec` names.

    Args:
        spec (`str`): `[NAME=]PATH`, a file (.jsonl, .json, .csv, .parquet; .txt, where blank lines end documents) or a
            folder, or `[NAME=]HUB/ID[:CONFIG][@REVISION]`.
        split (`str`, *optional*): the split; test, validation or train, the first that there is, when omitted.
        tokenizer, column, max_documents, max_length: see `HeldOutData.from_dataset`.

    Raises:
        ValueError: if there is no such data, split or column, or nothing in it.
    """
    require("datasets", "Held-out data")
    name, place = parse_spec(spec)
    # Of the hub's, a stream of some documents instead of all of a corpus.
    streaming = max_documents is not None and not os.path.exists(place) and not data_files(place)
    try:
        data = HeldOutData.from_dataset(
            open_split(place, split, streaming=streaming),
            tokenizer,
            column=column,
            max_documents=max_documents,
            max_length=max_length,
        )
    except ValueError as error:
        raise ValueError(f"Data {place!r}: {error}") from error
    return name, data
