"""The metric for the `evaluate` library, loaded from the package without a network."""

import pytest
import torch
from toy_trl import rows, tokenizer

from hf_sam.instruments import HeldOutData, held_out_loss, metric_path
from hf_sam.runtime.models import find_model
from hf_sam.statistics import forgetting

evaluate = pytest.importorskip("evaluate")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(metric_path(), cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_values_are_those_of_the_functions(shelf, metric):
    texts = rows("text", count=10)["text"]
    found = metric.compute(
        predictions=texts, model_id=str(shelf / "tuned2"), base_model_id=str(shelf / "base"), batch_size=3
    )
    data = HeldOutData.from_dataset(texts, tokenizer())
    before, after = (
        held_out_loss(find_model(str(shelf / n)).load(torch.float32), data, batch_size=3) for n in ("base", "tuned2")
    )
    lost = forgetting(before, after)
    assert found == {
        "held_out_loss": after.loss,
        "perplexity": after.perplexity,
        "tokens": after.tokens,
        "forgetting": lost.value,
        "forgetting_low": lost.low,
        "forgetting_high": lost.high,
    }
    alone = metric.compute(predictions=texts, model_id=str(shelf / "adapter"))
    assert set(alone) == {"held_out_loss", "perplexity", "tokens"}


def test_its_description_is_there(metric):
    assert "nats per token" in metric.description
    assert "base_model_id" in metric.inputs_description
