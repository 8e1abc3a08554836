"""The training runs whose trajectories every strategy has to share."""

from dataclasses import dataclass, field

from hf_sam.step.variants import VARIANTS

GLOBAL_BATCH = 8  # rows of a micro-batch, summed over ranks
MAX_STEPS = 6
LEARNING_RATE = 2e-3


@dataclass(frozen=True, eq=False)  # hashable by identity; the fields hold dicts
class Case:
    """One run: what differs from plain SAM of a small OLMo-2 in fp32 without accumulation."""

    name: str
    accumulation: int = 1
    sam: dict = field(default_factory=lambda: {"sam_rho": 0.05})
    model: str = "olmo2"
    dropout: float = 0.0
    bf16: bool = False
    offload: bool = False
    zero: dict = field(default_factory=dict)  # options of `zero_optimization`
    sft: bool = False  # TRL's trainer instead of transformers'
    only: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        """Class of the layers that FSDP2 shards one by one."""
        return "Linear" if self.model == "branches" else "Olmo2DecoderLayer"

    @property
    def arguments(self) -> dict:
        return {
            "max_steps": MAX_STEPS,
            "learning_rate": LEARNING_RATE,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": self.bf16,
            **self.sam,
        }


# Radii of variants whose rho is on another scale than that of SAM.
RADII = {"asam": 0.5, "momentum": 0.1}
TARGETED = {"sam_rho": 0.05, "sam_target_modules": [r"mlp", r"norm"], "sam_exclude_modules": [r"layers\.0\.mlp\.up"]}

MOMENTUM_AND_NOISE = {"sam_rho": 0.1, "sam_noise": 0.1, "sam_variant": "momentum"}

CASES = (
    Case("sam"),
    Case("sam_accumulation", accumulation=2),
    *(
        Case(f"{variant}_accumulation", 2, sam={"sam_rho": RADII.get(variant, 0.05), "sam_variant": variant})
        for variant in VARIANTS
        if variant != "sam"
    ),
    Case("first_of_three", accumulation=3, sam={"sam_rho": 0.05, "sam_ascent_micro_batches": 1}),
    Case("momentum_and_noise", sam=MOMENTUM_AND_NOISE),
    Case("offload_momentum_and_noise", sam=MOMENTUM_AND_NOISE, offload=True, only=("zero2", "zero3")),
    Case("sam_and_noise", accumulation=2, sam={"sam_rho": 0.05, "sam_noise": 0.1, "sam_interval": 2}),
    # Some steps are limited by the rise of the loss, some by the radius.
    Case("loss_rise", accumulation=2, sam={"sam_rho": 0.034, "sam_loss_rise": 0.03}),
    Case("targeted", sam=TARGETED),
    Case("lora", accumulation=2, model="lora"),
    Case("branches", model="branches"),
    Case("bf16", accumulation=2, bf16=True),
    Case("bf16_momentum_and_noise", bf16=True, sam=MOMENTUM_AND_NOISE),
    Case("branches_offload", model="branches", offload=True, only=("zero2", "zero3")),
    Case("offload", accumulation=2, offload=True, only=("zero1", "zero2", "zero3")),
    Case("round_robin", accumulation=2, zero={"round_robin_gradients": True}, only=("zero1", "zero2")),
    Case("overlap", accumulation=2, zero={"overlap_comm": True, "contiguous_gradients": True}, only=("zero2", "zero3")),
    Case("local_ascent", accumulation=2, sam={"sam_rho": 0.05, "sam_ascent_sync": "local"}, only=("ddp",)),
    Case("sft", accumulation=2, sft=True, only=("ddp", "fsdp2", "zero3")),
    Case("plain", accumulation=2, sam={"sam_rho": 0.0}),
)


def cases_of(strategy: str) -> list[Case]:
    """The cases that `strategy` runs."""
    return [case for case in CASES if not case.only or strategy in case.only]
