"""Variants of SAM by name: one file each, which says what e is, with its equation and source.

To add one, write a subclass of [`Variant`] in a file of this package and register it here; `sam_variant` then accepts
its name. Outside of hf-sam, call [`register`] before the training arguments are made.
"""

from ...runtime.errors import did_you_mean
from .asam import ASAM
from .base import Piece, Variant
from .sam import SAM

__all__ = ["DEFAULT", "VARIANTS", "Piece", "Variant", "get_variant", "register"]

VARIANTS: dict[str, type[Variant]] = {}
DEFAULT = SAM.name


def register(variant: type[Variant]) -> type[Variant]:
    """Make a variant known by its name; returns it, so that it can decorate the class.

    Raises:
        ValueError: if another variant has that name, or it needs another number of passes than the step runs.
    """
    if variant.passes != 2:
        raise ValueError(f"{variant.__qualname__} has passes={variant.passes}, but a step runs 2: ascent and descent.")
    if VARIANTS.get(variant.name, variant) is not variant:
        raise ValueError(f"There is already a variant {variant.name!r}: {VARIANTS[variant.name].__qualname__}.")
    VARIANTS[variant.name] = variant
    return variant


for _variant in (SAM, ASAM):
    register(_variant)


def get_variant(name: str = DEFAULT) -> Variant:
    """A new instance of the variant of that name.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    check_variant(name)
    return VARIANTS[name]()


def check_variant(name: str, field: str = "variant") -> None:
    """Raises ValueError, which calls the value `field`, unless a variant has that name."""
    if not isinstance(name, str) or name not in VARIANTS:
        near = did_you_mean(str(name), VARIANTS)
        raise ValueError(f"{field}={name!r} must be one of {', '.join(map(repr, VARIANTS))}{near or '.'}")
