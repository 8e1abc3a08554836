"""The section of a model card on sharpness-aware training and shortened annealing."""

import os

from huggingface_hub import ModelCard

from .arguments import SAMArguments
from .history import SAMHistory

_HEADINGS = _SAM, _ANNEALING = "## Sharpness-aware training", "## Shortened annealing"

_PAPER = """\
@misc{sharpness_aware_pretraining,
    title  = {Sharpness-Aware Pretraining Mitigates Catastrophic Forgetting},
    eprint = {2605.02105},
    archivePrefix = {arXiv},
    url    = {https://arxiv.org/abs/2605.02105},
}"""
_SAM_PAPER = """\
@inproceedings{foret2021sharpnessaware,
    title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
    author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
    booktitle = {International Conference on Learning Representations},
    year      = {2021},
    url       = {https://arxiv.org/abs/2010.01412},
}"""


def describe_in_model_card(path: str, args: SAMArguments, log_history: list[dict], history: SAMHistory) -> None:
    """Add tags, settings, counts of SAM steps, and citations to the model card that `Trainer` wrote.

    Args:
        path (`str`): the model card. Nothing happens if it does not exist, or the run used neither SAM nor annealing.
        args ([`SAMArguments`]): arguments of the run.
        log_history (`list[dict]`): logs of the run.
        history ([`SAMHistory`]): counts of the SAM steps.
    """
    settings = used_settings(args)
    if not settings or not os.path.isfile(path):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if any(heading in card.text for heading in _HEADINGS):
        return
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in _tags(history) if tag not in tags)]
    card.text = f"{card.text.rstrip()}\n\n{_section(args, settings, log_history, history)}\n"
    card.save(path)


def used_settings(args: SAMArguments) -> dict:
    """The SAM and annealing fields of the features in use, without unset fields."""
    settings = {}
    for name in SAMArguments.__dataclass_fields__:
        in_use = args.anneal_steps is not None if name.startswith("anneal_") else args.uses_sam
        if in_use and getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return settings


def _tags(history: SAMHistory) -> list[str]:
    return ["hf-sam", "sharpness-aware-minimization"] if history.acted or history.noisy else ["hf-sam"]


def _section(args: SAMArguments, settings: dict, log_history: list[dict], history: SAMHistory) -> str:
    lines, papers = (
        [_ANNEALING, "", "The learning rate was constant and then decayed in a short final phase."],
        [_PAPER],
    )
    if args.uses_sam:
        lines = [_SAM, "", _what_happened(args, history)]
        papers.append(_SAM_PAPER)
    lines += ["", "| setting | value |", "| --- | --- |"]
    lines += [f"| `{name}` | {value} |" for name, value in settings.items()]
    last = next((logs for logs in reversed(log_history) if "sam/sharpness" in logs), None)
    if last is not None and history.acted:
        lines.append(f"| last sharpness, L(w + e) - L(w) | {last['sam/sharpness']:.4g} (step {last['step']}) |")
    return "\n".join([*lines, "", "### Citation of the method", "", "```bibtex", *papers, "```"])


def _what_happened(args: SAMArguments, history: SAMHistory) -> str:
    if not history.acted and history.noisy:
        return (
            f"The gradient was computed with random noise on the weights in {history.noisy} of {history.steps} steps."
        )
    if not history.acted:
        return (
            f"{history.summary()} SAM was configured as below, but all gradients were computed at the unperturbed "
            "weights, as in plain training."
        )
    where = "the worst weights nearby" if args.ascends else "perturbed weights"
    return f"{history.summary()} In these steps, the gradient was computed at {where}."
