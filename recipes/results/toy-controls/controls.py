"""Why does SAM in every 10th step work? Controls that change one part of these steps each.

python recipes/results/toy-controls/controls.py --seeds 1 2 3

The pretraining and two runs are those of `recipes/reproduce.py --preset toy-interval --seeds 1 2 3`, and are not
repeated in its --output_dir, which is the default. The report, in evaluation/comparison, replaces that of the preset.
"""

import abc
import argparse
import os
import random
import sys
from collections import deque
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_sam.commands.reproduce import run_stage
from hf_sam.experiments.driver import run_chain
from hf_sam.experiments.experiment import Experiment
from hf_sam.experiments.presets import read_preset
from hf_sam.experiments.stages import Chain
from hf_sam.step.variants import SAM, Variant, register


class RandomDirection(Variant):
    """The direction is random: e = rho * u / ||u||."""

    name = "random-direction"
    equation = "e = rho * u / ||u||, u uniform of mean 0 and variance 1"
    source = "control"
    passes = 1

    def norms(self, pieces):
        return [piece.noise().norm() for piece in pieces]

    def to_direction(self, pieces):
        for piece in pieces:
            piece.gradient = piece.noise()


class SecondMomentControl(SAM):
    """SAM after whose steps the second moment of AdamW is set to what another gradient would have made of it.

    For one device, fp32 and a step of one micro-batch. `Trainer` clips the gradient at w + e, so the gradient at w is
    clipped likewise.
    """

    source = "control"
    max_norm = 1.0

    def __init__(self):
        self._ascent: dict[int, torch.Tensor] = {}
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._squared: dict[torch.Tensor, torch.Tensor] = {}
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def to_direction(self, pieces):
        for piece in pieces:
            self._ascent[piece.stored.data_ptr()] = piece.gradient.clone()

    def before_step(self, optimizer, args, kwargs):
        """Note the second moments, and choose the gradients of the step and of the second moments."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        if not self._ascent:
            return
        ascent = [self._ascent[param.data_ptr()].view_as(param) for param in params]
        norm = torch.stack([gradient.norm() for gradient in ascent]).norm()
        for param, gradient in zip(params, ascent, strict=True):
            gradient *= (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            self._before[param] = optimizer.state[param]["exp_avg_sq"].clone()
            self._squared[param] = self.choose(param.grad, gradient).square()
        self._ascent.clear()

    def after_step(self, optimizer, args, kwargs):
        """Set the second moments."""
        for group in optimizer.param_groups:
            for param in self._before.keys() & set(group["params"]):
                found = torch.lerp(self._squared.pop(param), self._before.pop(param), group["betas"][1])
                optimizer.state[param]["exp_avg_sq"].copy_(found)

    @abc.abstractmethod
    def choose(self, gradient: torch.Tensor, ascent: torch.Tensor) -> torch.Tensor:
        """The gradient that the second moment is made of. May change that of the step, `gradient`, in place."""


class NotInSecondMoment(SecondMomentControl):
    """The step follows the gradient at w + e; the second moment remembers the one at w."""

    name = "not-in-second-moment"

    def choose(self, gradient, ascent):
        return ascent


class OnlyInSecondMoment(SecondMomentControl):
    """The step follows the gradient at w; the second moment remembers the one at w + e."""

    name = "only-in-second-moment"

    def choose(self, gradient, ascent):
        perturbed = gradient.clone()
        gradient.copy_(ascent)
        return perturbed


class ChosenSteps(SAM):
    """SAM in a tenth of the steps, chosen step by step. The other steps have an ascent pass that changes nothing."""

    source = "control"

    def to_direction(self, pieces):
        if not self.chosen(torch.stack(self.norms(pieces)).norm().item()):
            for piece in pieces:
                piece.gradient.zero_()

    @abc.abstractmethod
    def chosen(self, norm: float) -> bool:
        """Whether SAM acts in a step whose ascent gradient has this norm."""


class RandomSteps(ChosenSteps):
    """A tenth of the steps, at random."""

    name = "random-steps"

    def __init__(self):
        self._random = random.Random(0)

    def chosen(self, norm):
        return self._random.random() < 0.1


class LargestGradients(ChosenSteps):
    """Steps whose gradient is longer than that of nine tenths of the hundred before; cf. AE-SAM (Jiang et al. 2023)."""

    name = "largest-gradients"

    def __init__(self):
        self._norms: deque[float] = deque(maxlen=100)

    def chosen(self, norm):
        shorter = sum(norm > other for other in self._norms)
        among = len(self._norms)
        self._norms.append(norm)
        return among >= 10 and shorter > 0.9 * among


VARIANTS = (RandomDirection, NotInSecondMoment, OnlyInSecondMoment, RandomSteps, LargestGradients)


def main(argv: list[str]) -> int:
    """Run all stages that are not finished, or one of them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output_dir", default="outputs/toy-interval")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--stage")
    given = parser.parse_args(argv)
    for variant in VARIANTS:
        register(variant)
    output = Path(given.output_dir)
    preset = {**read_preset(str(Path(__file__).with_name("controls.yaml"))), "seeds": given.seeds}
    chain = Chain(Experiment(preset, output, devices=1).stages(), output)
    if given.stage:
        return run_stage(chain, chain[given.stage], preset, 1, argv)
    flags = ["--output_dir", given.output_dir, "--seeds", *map(str, given.seeds)]
    finished = run_chain(
        chain,
        [""] * (os.cpu_count() or 1),
        lambda stage: [sys.executable, __file__, *flags, "--stage", stage.name],
    )
    if finished:
        print(f"The report is in {output / 'evaluation' / 'comparison'}.")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
