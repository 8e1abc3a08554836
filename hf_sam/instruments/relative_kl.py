"""KL divergence under noise in proportion to each weight tensor, which a rescaling of layers does not change.

Multiply the weights of one layer and divide those of the next: the function of the model is the same, but noise of one
size for all weights now weighs differently (Dinh et al. 2017, arXiv 1703.04933). Noise in units of each tensor's root
mean square follows the rescaling.
"""

from .kl import NoiseKL, noise_kl
from .registry import Column, Instrument, register, with_error


def relative_noise_kl(model, data, *, sigma: float = 1e-3, **options) -> NoiseKL:
    """Sharpness as the KL divergence under noise in units of the root mean square of each weight tensor.

    Args:
        model, data, options: as for [`noise_kl`].
        sigma (`float`, defaults to 1e-3): standard deviation of the noise in these units; 1e-3 is 0.1% of the weights.
    """
    return noise_kl(model, data, sigma=sigma, relative_to="weights", **options)


register(
    Instrument(
        name="relative_kl",
        passes=11,
        group="sharpness",
        help="KL divergence under Gaussian noise of 0.1% of each weight tensor; does not change with its scale",
        measure=lambda model, data, **options: relative_noise_kl(model, data, **options).to_dict(),
        options=lambda settings: {"seed": settings.seed},
        columns=(Column("KL under noise of 0.1%", lambda found: with_error(found["value"], found["standard_error"])),),
        note="Noise of 0.1% is in units of the root mean square of each weight tensor.",
        scalars=lambda found: {"relative_kl": found["value"]},
        fp32=True,
    )
)
