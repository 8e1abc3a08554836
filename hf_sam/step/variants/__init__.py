"""Registry of SAM variants. Each variant is one file that defines the perturbation e, with its equation and source.

To add a variant, write a subclass of [`Variant`] in a file of this package and register it here; `sam_variant` then
accepts its name. Outside of hf-sam, call [`register`] before you create the training arguments.
"""

from ...runtime.errors import did_you_mean
from .asam import ASAM
from .base import Piece, Variant
from .momentum import Momentum
from .sam import SAM

__all__ = ["DEFAULT", "VARIANTS", "Piece", "Variant", "get_variant", "register"]

VARIANTS: dict[str, type[Variant]] = {}
DEFAULT = SAM.name


def register(variant: type[Variant]) -> type[Variant]:
    """Register a variant under its name; usable as a class decorator.

    Raises:
        ValueError: if another variant has this name, or its number of passes is neither 1 nor 2.
    """
    if variant.passes not in (1, 2):
        raise ValueError(
            f"{variant.__qualname__} has passes={variant.passes}, but a step has 2, ascent and descent, or 1, descent."
        )
    if VARIANTS.get(variant.name, variant) is not variant:
        raise ValueError(
            f"There is already a variant {variant.name!r}: {VARIANTS[variant.name].__qualname__}. Choose another name."
        )
    VARIANTS[variant.name] = variant
    return variant


for _variant in (SAM, ASAM, Momentum):
    register(_variant)


def get_variant(name: str = DEFAULT) -> Variant:
    """Create an instance of the variant called `name`.

    Raises:
        ValueError: if no such variant is registered; the message lists the known names.
    """
    check_variant(name)
    return VARIANTS[name]()


def check_variant(name: str, field: str = "variant") -> None:
    """Raises ValueError unless a variant called `name` is registered; `field` is the name of the argument."""
    if not isinstance(name, str) or name not in VARIANTS:
        near = did_you_mean(str(name), VARIANTS)
        raise ValueError(f"{field}={name!r} must be one of {', '.join(map(repr, VARIANTS))}{near or '.'}")
