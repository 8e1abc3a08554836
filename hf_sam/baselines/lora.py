"""LoRA as a baseline: it learns less and forgets less (Biderman et al. 2024, arXiv 2405.09673)."""


def lora_config(rank: int = 16, **overrides):
    """LoRA as in the paper: adapters on all linear layers, with alpha twice the rank.

    It needs a learning rate about ten times that of full fine-tuning. Pass the config to a trainer as `peft_config`, or
    to `peft.get_peft_model`.

    Args:
        rank (`int`, defaults to 16): rank of the adapters; the paper uses 16, 64 and 256.
        overrides: other fields of `peft.LoraConfig`.

    Returns:
        `peft.LoraConfig`: the config.

    Raises:
        ImportError: if PEFT is missing.
    """
    from ..runtime.packages import require

    require("peft", "LoRA")
    from peft import LoraConfig

    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **overrides})
