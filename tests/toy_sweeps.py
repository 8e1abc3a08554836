"""Sweeps of learning rates whose true curves are known: forgetting is a power of the distance of the task losses."""

from dataclasses import dataclass

import numpy as np

from hf_sam.statistics import HeldOutLoss, TunedRun

# Task loss of the base.
START = 4.55


@dataclass(frozen=True)
class World:
    """Where the documents of a sweep come from.

    Attributes:
        documents, task_documents (`int`): how many are measured.
        spread (`float`): standard deviation of the logarithm of their lengths; 0 for equal ones.
        power (`float`): forgetting is `scale * (START - task loss) ** power`.
        run_noise (`float`): relative noise of each run's forgetting, and of what all runs of a seed share.
    """

    documents: int = 200
    task_documents: int = 100
    spread: float = 1.0
    power: float = 2.1
    run_noise: float = 0.0


def lengths(generator: np.random.Generator, documents: int, spread: float) -> np.ndarray:
    """Tokens of each document: equal, or lognormal."""
    if not spread:
        return np.full(documents, 128)
    return np.maximum(2, np.exp(generator.normal(5, spread, documents))).astype(int)


def sweeps(world: World, grids: dict[str, tuple[np.ndarray, float]], seeds: int, generator: np.random.Generator):
    """For each method and seed, the runs of a sweep, all on the same documents.

    Args:
        world ([`World`]): the truth.
        grids (`dict[str, tuple[np.ndarray, float]]`): learning rates, and scale of the forgetting, by method.
        seeds (`int`): training seeds.
        generator (`np.random.Generator`): draws documents and noise.

    Returns:
        `dict[str, list[list[TunedRun]]]`: by method, a sweep for each seed.
    """
    old = lengths(generator, world.documents, world.spread)
    task = np.maximum(10, generator.normal(90, 40, world.task_documents)).astype(int)
    # How much a document is forgotten, and how hard a task is, is much the same for all models.
    forgotten = np.exp(generator.normal(-0.125, 0.5, len(old)))
    hard = generator.normal(0, 0.5, len(task))
    found = {}
    for name, (rates, scale) in grids.items():
        found[name] = []
        for _ in range(seeds):
            shared = world.run_noise * generator.standard_normal(2)
            sweep = []
            for rate in rates:
                own = world.run_noise / 2 * generator.standard_normal(2)
                loss = START - 0.42 - 0.72 * np.log2(rate / 1.5e-4) + (shared[0] + own[0]) / 3
                lost = scale * (START - loss) ** world.power * np.exp(shared[1] + own[1])
                growth = lost * old * forgotten * np.exp(generator.normal(-0.02, 0.2, len(old)))
                growth += generator.normal(0, 0.3, len(old)) * np.sqrt(old)
                losses = task * (loss + hard + generator.normal(0, 0.02, len(task)))
                before = HeldOutLoss(2.5 * old, old)
                sweep.append(
                    TunedRun(f"{rate:g}", before, HeldOutLoss(2.5 * old + growth, old), HeldOutLoss(losses, task))
                )
            found[name].append(sweep)
    return found
