"""Evaluations of one method with several training seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluation.results import Results

# `sam-seed-3`, `sam/seed3`, `sam_seed=3`, `seed-3-sam`.
SEED_PATTERN = r"(?P<method>.*?)[-_/. ]*seed[-_= ]?(?P<seed>\d+)(?P<rest>.*)"


@dataclass(frozen=True)
class Method:
    """The evaluations of one method.

    Attributes:
        name (`str`): name of the evaluations without their seeds.
        by_seed (`dict[int | None, Results]`): the evaluation of each seed; None for one whose name has no seed.
    """

    name: str
    by_seed: dict[int | None, Results]

    @property
    def results(self) -> list[Results]:
        """The evaluations."""
        return list(self.by_seed.values())


def group_by_seed(results: Sequence[Results], pattern: str = SEED_PATTERN) -> list[Method]:
    """Group evaluations whose names differ in the seed only, in the order of their first ones.

    Args:
        results (`Sequence[Results]`): the evaluations.
        pattern (`str`): regular expression of a whole name, with the groups `method` and `seed`; what a group `rest`
            matches belongs to the name. A name that it does not match is a method of its own.

    Raises:
        ValueError: if the pattern lacks a group, or a method has two evaluations with one seed.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--seed_pattern {pattern!r} is not a regular expression: {error}.") from error
    if not {"method", "seed"} <= compiled.groupindex.keys():
        raise ValueError(f"--seed_pattern {pattern!r} needs the groups (?P<method>...) and (?P<seed>...).")
    methods: dict[str, dict[int | None, Results]] = {}
    for one in results:
        name, seed = _split(one.name, compiled)
        seeds = methods.setdefault(name, {})
        if seed in seeds:
            names = f"{seeds[seed].name!r} and {one.name!r}"
            raise ValueError(f"The evaluations {names} are of one method and one seed; name them with --name.")
        seeds[seed] = one
    return [Method(name, seeds) for name, seeds in methods.items()]


def _split(name: str, pattern: re.Pattern) -> tuple[str, int | None]:
    found = pattern.fullmatch(name)
    if not found or not found["seed"].isdigit():
        return name, None
    parts = (found["method"], found["rest"] if "rest" in pattern.groupindex else "")
    return "".join(filter(None, parts)).strip("-_/. ") or name, int(found["seed"])


def pair(reference: Method, method: Method) -> list[tuple[Results, Results]]:
    """The evaluations of two methods with the same seeds; the first ones, if no seed is in both."""
    common = [seed for seed in reference.by_seed if seed in method.by_seed]
    if not common:
        return [(reference.results[0], method.results[0])]
    return [(reference.by_seed[seed], method.by_seed[seed]) for seed in common]
