"""The instruments and the penalties under every strategy."""

import copy
from pathlib import Path

import torch
from distributed.cases import Case
from toy import olmo2
from toy_evaluation import held_out, moved, sharp_olmo2

from hf_sam import SAMTrainer
from hf_sam.baselines import L2Arguments, L2Mixin, estimate_fisher
from hf_sam.baselines.penalties import _Penalty
from hf_sam.instruments import (
    ForgettingCallback,
    HeldOutData,
    SharpnessCallback,
    held_out_loss,
    hessian_spectrum,
    loss_along_line,
    noise_kl,
    noise_sensitivity,
    relative_hessian_trace,
    relative_noise_kl,
    representation_similarity,
    sam_sharpness,
)
from hf_sam.runtime.distributed import all_reduce_sum, rank_and_world

# Noise can be added to these; the weights of ZeRO-3 are out of reach.
NOISY = ("single", "ddp", "fsdp2")
# ZeRO-3 stands for all of DeepSpeed: the others hold whole weights, as DDP does.
MEASURED = (*NOISY, "zero3")
# The penalty goes into gradients that DeepSpeed has used by then.
PENALIZED = ("single", "ddp", "fsdp2")


def measured(strategy: str, output_dir: Path) -> None:
    """Training with and without the callbacks, with dropout."""
    from distributed import worker

    if strategy not in MEASURED:
        return

    runs = {}
    for callbacks in (False, True):
        case = Case("measured", accumulation=2, sam={"sam_rho": 0.05}, dropout=0.1)
        trainer = worker.build_trainer(strategy, case, output_dir, max_steps=2)
        if callbacks:
            trainer.add_callback(ForgettingCallback(trainer, held_out(7), batch_size=2))
            if strategy in NOISY:
                # Much noise, or the deviation between strategies would be that of fp32.
                options = {"kl": {"samples": 2, "sigma": 1e-2}}
                trainer.add_callback(SharpnessCallback(trainer, held_out(3), batch_size=2, **options))
        trainer.train()
        runs[callbacks] = {"weights": worker.full_weights(trainer), "random_state": torch.get_rng_state()}
        logs = trainer.state.log_history
    refusal = None
    if strategy not in NOISY:
        try:
            noise_kl(trainer.model_wrapped, held_out(3))
        except ValueError as error:
            refusal = str(error)
    worker.save(trainer, output_dir / "measured.pt", plain=runs[False], measured=runs[True], logs=logs, refusal=refusal)


class _PenalizedTrainer(L2Mixin, SAMTrainer):
    pass


def penalized(strategy: str, output_dir: Path) -> None:
    """L2-to-base with SAM and gradient accumulation; DeepSpeed refuses."""
    from distributed import worker

    if strategy not in MEASURED:
        return

    case = Case("penalized", accumulation=2, sam={"sam_rho": 0.05})
    overrides = {"l2_lambda": 20.0, "config_class": worker.config_with(L2Arguments)}
    try:
        trainer = worker.build_trainer(strategy, case, output_dir, trainer_class=_PenalizedTrainer, **overrides)
    except ValueError as error:
        if rank_and_world()[0] == 0:
            torch.save({"refusal": str(error)}, output_dir / "penalized.pt")
        return
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    worker.save(trainer, output_dir / "penalized.pt", logs=logs, weights=worker.full_weights(trainer))


def instruments(strategy: str, output_dir: Path) -> None:
    """Every function on a model that is whole on each process, with more rows than divide evenly."""
    if strategy not in ("single", "ddp"):
        return
    model = sharp_olmo2(initializer_range=0.1)
    other = moved(model, 0.02)
    before = copy.deepcopy(model.state_dict())
    data = held_out(7)
    common = {"batch_size": 2}
    tiny = sharp_olmo2(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    loader = torch.utils.data.DataLoader(
        [{"input_ids": torch.tensor(row.input_ids)} for row in data.rows], batch_size=1
    )
    results = {
        "losses": held_out_loss(model, data, **common).document_losses,
        "loader": held_out_loss(model, loader).document_losses,
        # One batch for all processes: some have nothing of their own.
        "alone": held_out_loss(model, data, batch_size=100).document_losses,
        "cut": held_out_loss(model, HeldOutData([row.__dict__ for row in data.rows], max_length=4)).document_losses,
        "kl": noise_kl(model, data, sigma=1e-3, samples=2, **common).samples,
        "relative kl": relative_noise_kl(model, data, sigma=1e-2, samples=2, **common).samples,
        "relative trace": relative_hessian_trace(model, data, probes=2, **common).value,
        "sensitivity": noise_sensitivity(model, data, strengths=(0.1,), samples=2, **common).losses[0],
        "sam": sam_sharpness(model, data, **common).perturbed_loss,
        "hessian": hessian_spectrum(tiny.double(), data, probes=3, eigenvalues=1, tolerance=1e-6, **common).to_dict(),
        "line": loss_along_line(model, other, data, positions=(0, 0.5, 1), **common).quadratic,
        "angles": representation_similarity(model, other, data, rank=3, **common).mean_principal_angles,
        "similar alone": representation_similarity(model, other, data, rank=3, batch_size=100).cka,
        "fisher": estimate_fisher(olmo2(), held_out(3))["lm_head.weight"],
    }
    rank, world = rank_and_world()
    # The last rank has not loaded its weights: all must say so, or the others would wait for it.
    unloaded = torch.nn.Linear(2, 2, device="meta" if rank == world - 1 else "cpu")
    try:
        _Penalty(unloaded, 1.0, None)
        refused = 0
    except ValueError:
        refused = 1
    results["refused"] = int(all_reduce_sum(torch.tensor(refused)))
    unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if rank == 0:
        torch.save({**results, "unchanged": unchanged, "world": world}, output_dir / "instruments.pt")


ALL = (measured, penalized, instruments)
