"""Computing a micro-batch twice leaves no trace: random streams, dropout masks and buffers."""

import random

import numpy as np
import pytest
import torch
from toy import Classifier, arguments, classification_rows, olmo2, step_logs, token_dataset, trainer

from hf_sam import SAMTrainer


@pytest.mark.parametrize("ascent", [None, 1])
@pytest.mark.parametrize("model_class", [Classifier, "olmo2"])
def test_random_streams_and_buffers_end_where_plain_training_leaves_them(tmp_path, ascent, model_class):
    def run(sam_rho):
        olmo = model_class == "olmo2"
        run = SAMTrainer(
            # A learning rate of 0 keeps the weights, so that only the streams and buffers can differ.
            model=olmo2(dropout=0.2) if olmo else Classifier(),
            args=arguments(
                tmp_path,
                sam_rho=sam_rho,
                learning_rate=0.0,
                max_steps=3,
                gradient_accumulation_steps=3,
                sam_ascent_micro_batches=ascent,
            ),
            train_dataset=token_dataset() if olmo else classification_rows(64),
        )
        run.train()
        streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        return streams, {name: value.clone() for name, value in run.model.named_buffers()}, step_logs(run)

    (torch_state, python_state, numpy_state), buffers, logs = run(0.0)
    (sam_torch_state, sam_python_state, sam_numpy_state), sam_buffers, sam_logs = run(0.1)
    assert torch.equal(torch_state, sam_torch_state)
    assert python_state == sam_python_state
    assert numpy_state == sam_numpy_state
    assert all("sam/sharpness" in entry for entry in sam_logs)
    if ascent is None:
        # Same masks in the same order: the clean loss of every step is the plain one to the last bit.
        assert [entry["loss"] for entry in sam_logs] == [entry["loss"] for entry in logs]
        for name, value in buffers.items():
            assert torch.equal(sam_buffers[name], value), name


def test_the_second_pass_sees_the_dropout_masks_of_the_first(tmp_path):
    masks = []  # not in the model, whose state the second pass leaves alone

    class MaskRecorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(50))

        def forward(self, features, labels):
            dropped = torch.nn.functional.dropout(self.weight, 0.5, self.training)
            masks.append((dropped != 0).tolist())
            return {"loss": (dropped * features.mean()).sum().square()}

    model = MaskRecorder()
    run = SAMTrainer(
        model=model,
        args=arguments(tmp_path, sam_rho=0.1, max_steps=2, gradient_accumulation_steps=3),
        train_dataset=classification_rows(64),
    )
    run.train()
    assert len(masks) == 12
    assert masks[0:3] == masks[3:6]
    assert masks[6:9] == masks[9:12]
    assert len({tuple(mask) for mask in masks}) == 6


def test_buffers_advance_once_however_they_are_changed(tmp_path):
    class Counts(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("in_place", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))
            self.register_buffer("constant", torch.ones(1).expand(5))  # cannot be written to

        def forward(self, features, labels):
            self.in_place.add_(1)
            self.replaced = self.replaced + 1
            return super().forward(features, labels)

    run = trainer(
        tmp_path,
        model=Counts(),
        dataset=classification_rows(64),
        sam_rho=0.1,
        max_steps=2,
        gradient_accumulation_steps=3,
        sam_ascent_micro_batches=2,
    )
    run.train()
    assert (run.model.in_place.item(), run.model.replaced.item()) == (6, 6)
    assert run.model.layers[1].num_batches_tracked == 6
