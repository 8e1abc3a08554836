"""The diagonal of the Fisher information: how important each weight is for the old data.

    F_i = E[(d log p(y | x) / d w_i)^2]

with one gradient per sequence. The squared gradient of a batch, which the code of arXiv 2605.02105 takes, is not the
same: gradients of opposite sign cancel, and it is smaller by up to the batch size. Values of lambda do not carry over
from one to the other.
"""

import copy
from pathlib import Path

import torch

from ..instruments.batches import batches_of
from ..instruments.displacement import floating_parameters
from ..instruments.documents import Batch, HeldOutData
from ..instruments.gradients import check_precise, only_trainable
from ..instruments.loss import counted_logits, token_losses
from ..instruments.measuring import measuring
from ..runtime.distributed import all_reduce_sum, shard
from ..runtime.labels import IGNORE_INDEX
from ..runtime.progress import progress
from ..runtime.sharding import check_unsharded
from ..step.parameters import plain_name


def estimate_fisher(
    model: torch.nn.Module,
    data,
    *,
    labels: str = "data",
    sequences: int | None = None,
    batch_size: int = 1,
    parameters: str | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Estimate the diagonal Fisher information of a causal language model from the gradients of single sequences.

    The log-likelihood of a sequence is its mean over tokens, so F and lambda have the scale of the training loss in
    nats per token. Memory: two copies of the weights.

    Args:
        model (`torch.nn.Module`): the base model, with unsharded fp32 weights; it is not changed.
        data ([`~hf_sam.instruments.HeldOutData`] or rows with `input_ids`): old data, one sequence per row.
        labels (`str`, defaults to `"data"`): `"data"`: the tokens of the data (empirical Fisher, as in arXiv
            2605.02105); `"model"`: tokens sampled from the predictions of the model (true Fisher).
        sequences (`int`, *optional*): number of rows to use; all when omitted.
        batch_size (`int`, defaults to 1): sequences of each gradient. Above 1, F is that of batch gradients, as in the
            code of arXiv 2605.02105: use it with the lambdas of the paper.
        parameters (`str`, *optional*): regular expression over parameter names; all trainable ones when omitted.
        seed (`int`, defaults to 0): seed of the sampled tokens.

    Returns:
        `dict[str, torch.Tensor]`: F by parameter name, in the shape of the parameter, on the CPU.

    Raises:
        ValueError: if weights are quantized, in 16 bits or sharded, or an argument is out of range.
    """
    if labels not in ("data", "model"):
        raise ValueError(f"labels={labels!r} must be 'data' or 'model'.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or larger.")
    if isinstance(data, torch.utils.data.DataLoader):
        raise ValueError("The Fisher information needs single sequences: pass the dataset instead of a dataloader.")
    rows = batches_of(_first(data, sequences), batch_size)
    with measuring(model, exact=True) as inner:
        params = floating_parameters(inner, parameters, "The Fisher information", trainable=True)
        check_precise(params, "The Fisher information")
        check_unsharded(params, "The Fisher information")
        fisher = {name: torch.zeros_like(param) for name, param in params.items()}
        with only_trainable(inner, params):
            numbered = list(enumerate(rows))
            for (number, row), counts in progress(shard(numbered), "Fisher information"):
                if counts:
                    losses = token_losses(inner, row) if labels == "data" else _sampled(inner, row, seed, number)
                    gradients = torch.autograd.grad(losses.mean(), list(params.values()), allow_unused=True)
                    for total, gradient in zip(fisher.values(), gradients, strict=True):
                        if gradient is not None:
                            total.addcmul_(gradient, gradient, value=1 / len(rows))
        return {plain_name(name): all_reduce_sum(value).cpu() for name, value in fisher.items()}


def _first(data, sequences: int | None) -> HeldOutData:
    """The first rows of the data."""
    if not isinstance(data, HeldOutData):
        data = HeldOutData(data)
    data = copy.copy(data)
    data.rows = data.rows[:sequences]
    return data


def _sampled(model, row: Batch, seed: int, number: int) -> torch.Tensor:
    """Losses of tokens sampled from the predictions of the model."""
    logits, _ = counted_logits(model, row)
    generator = torch.Generator(device=logits.device).manual_seed((seed << 32) + number)
    drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits.float(), drawn, ignore_index=IGNORE_INDEX, reduction="none")


def save_fisher(fisher: dict[str, torch.Tensor], path: str | Path, **about: str) -> None:
    """Save F as a safetensors file.

    Args:
        fisher (`dict[str, torch.Tensor]`): result of [`estimate_fisher`].
        path (`str` or `Path`): the file.
        about: metadata to save with it, e.g. `model="allenai/OLMo-2-0425-1B"`, `data="dolmino"`.
    """
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in fisher.items()}
    save_file(tensors, str(path), metadata={"format": "pt", "kind": "hf-sam fisher", **about})


def load_fisher(path: str | Path) -> dict[str, torch.Tensor]:
    """Load F from a file of [`save_fisher`].

    Raises:
        ValueError: if the file does not exist or was not written by [`save_fisher`].
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise ValueError(
            f"There is no Fisher information at {str(path)!r}. Create it with estimate_fisher and save_fisher."
        )
    with safe_open(str(path), framework="pt") as file:
        if (file.metadata() or {}).get("kind") != "hf-sam fisher":
            raise ValueError(
                f"{str(path)!r} contains tensors, but not those that hf_sam.baselines.save_fisher writes. Create it "
                "with estimate_fisher and save_fisher."
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
