"""`SAMSFTTrainer`: TRL's supervised fine-tuning with sharpness-aware steps. Needs the extra `sft`."""

from dataclasses import dataclass

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f"SAMSFTTrainer and SAMSFTConfig need TRL ({error}). Install it with `pip install 'hf-sam[sft]'`."
    ) from error

from .arguments import SAMArguments
from .configs import SHIPPED
from .trainer import SAMMixin


@dataclass(repr=False)
class SAMSFTConfig(SAMArguments, SFTConfig):
    """[`~trl.SFTConfig`] with the fields of [`SAMArguments`]."""


SHIPPED[SFTConfig] = SAMSFTConfig


class SAMSFTTrainer(SAMMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] with sharpness-aware steps; takes [`SAMSFTConfig`]. See [`SAMMixin`].

    TRL's metrics (`entropy`, `mean_token_accuracy`, `num_tokens`) are computed at the unperturbed weights.

    Raises:
        ValueError: see [`SAMMixin`]; also if `args` has SAM fields but is not an `SFTConfig`.
    """

    def __init__(self, model=None, args=None, *more, **kwargs):
        if isinstance(args, SAMArguments) and not isinstance(args, SFTConfig):
            # TRL would convert them to a plain SFTConfig and drop the SAM fields.
            raise ValueError(f"{type(self).__name__} needs hf_sam.SAMSFTConfig, but got {type(args).__name__}.")
        super().__init__(model, args, *more, **kwargs)
