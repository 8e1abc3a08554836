"""Held-out loss, perplexity and forgetting as a metric of the `evaluate` library.

`evaluate.load(hf_sam.instruments.metric_path())` loads it from the installed package, without a network.
"""

import datasets
import evaluate
import torch

from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.runtime.models import check_same_tokens, find_model
from hf_sam.statistics.losses import forgetting

_DESCRIPTION = """\
Held-out loss of a causal language model in nats per token (the sum over all tokens divided by their number), its
perplexity, and, against a base model, forgetting: the loss after minus before.
"""

_INPUTS = """
Args:
    predictions (list of str): held-out documents.
    model_id (str): folder or hub id (`@revision` may follow) of the model; folders of adapters are merged.
    base_model_id (str, optional): the model before fine-tuning; adds forgetting.
    max_length (int, defaults to 1024): tokens in a row; longer documents take several rows.
    batch_size (int, defaults to 8): rows in a batch; no result depends on it.
    device (str, defaults to "cpu"): where the models run.
Returns:
    held_out_loss (float): nats per token.
    perplexity (float): exp(held_out_loss).
    tokens (int): number of predicted tokens.
    forgetting, forgetting_low, forgetting_high (float): with base_model_id, and its 95% interval.
Examples:
    >>> metric = evaluate.load(hf_sam.instruments.metric_path())
    >>> metric.compute(predictions=texts, model_id="out/tuned", base_model_id="allenai/OLMo-2-0425-1B")
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class HeldOutLossMetric(evaluate.Metric):
    """See the description of the module."""

    def _info(self):
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model_id, base_model_id=None, max_length=1024, batch_size=8, device="cpu"):
        source = find_model(model_id)
        base = None if base_model_id is None else find_model(base_model_id)
        tokenizer = (base or source).tokenizer()
        if base is not None:
            check_same_tokens(tokenizer, source.tokenizer(), source.name)
        data = HeldOutData.from_dataset(predictions, tokenizer, max_length=max_length)
        after = held_out_loss(source.load(torch.float32, {"": device}), data, batch_size=batch_size)
        result = {"held_out_loss": after.loss, "perplexity": after.perplexity, "tokens": after.tokens}
        if base is not None:
            before = held_out_loss(base.load(torch.float32, {"": device}), data, batch_size=batch_size)
            lost = forgetting(before, after)
            result |= {"forgetting": lost.value, "forgetting_low": lost.low, "forgetting_high": lost.high}
        return result
