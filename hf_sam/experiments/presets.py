"""The presets, which come with hf-sam or are YAML files of the user: read and checked."""

from pathlib import Path

from ..runtime.config import read_config

PRESETS = Path(__file__).parent / "configs" / "presets"
_KEYS = {
    "device",
    "accelerate_config",
    "model",
    "seeds",
    "data",
    "pretrain",
    "anneal",
    "sft",
    "evaluate",
    "comparisons",
}


def preset_names() -> list[str]:
    """The presets that come with hf-sam."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict:
    """The preset with that name, or in that YAML file.

    Raises:
        ValueError: if there is none, or it holds unknown keys.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no preset {name!r}; choose from {', '.join(preset_names())}, or pass a YAML file.")
    preset = read_config(path)
    if unknown := sorted(preset.keys() - _KEYS):
        raise ValueError(f"{path} sets {unknown[0]!r}; its keys are {', '.join(sorted(_KEYS))}.")
    for key in ("anneal", "evaluate"):
        if key not in preset:
            raise ValueError(f"{path} has no {key!r}; a preset needs anneal and evaluate.")
    check_seeds(preset.get("seeds"), f"{path}: seeds")
    if "comparisons" in preset:
        _check_comparisons(preset, path)
    return preset


def _check_comparisons(preset: dict, path: Path) -> None:
    """Raises ValueError unless each run of the annealing is in one of the comparisons."""
    if empty := [name for name, names in preset["comparisons"].items() if not names]:
        raise ValueError(f"{path}: the comparison {empty[0]!r} has no runs.")
    named = [name for names in preset["comparisons"].values() for name in names]
    known = list(preset["anneal"].get("runs", {}))
    wrong = [name for name in known if named.count(name) != 1] + [name for name in named if name not in known]
    if wrong:
        raise ValueError(
            f"{path}: each run of anneal must be in exactly one of the comparisons, but {wrong[0]!r} is in "
            f"{named.count(wrong[0])}" + ("." if wrong[0] in known else ", and is no run of anneal.")
        )


def check_seeds(seeds, where: str) -> None:
    """Raises ValueError unless `seeds` is None or a list of different integers, none of them negative."""
    if seeds is None:
        return
    valid = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}={seeds!r} must be a list of different integers that are not negative, e.g. [1, 2].")
