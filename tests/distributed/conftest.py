"""The worker of each strategy runs once for all tests of it."""

import functools

import pytest
import torch
from distributed.launch import launch


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Results of the worker by strategy and name; the worker of a strategy runs once, when it is first asked for."""

    @functools.cache
    def run(strategy):
        output_dir = tmp_path_factory.mktemp(strategy)
        try:
            launch(strategy, output_dir)
        except RuntimeError as error:
            # Kept, so that a strategy that fails fails once and not once a test.
            return output_dir, error
        return output_dir, None

    def result(strategy, name):
        output_dir, error = run(strategy)
        file = output_dir / f"{name}.pt"
        if error is not None and not file.exists():
            raise error
        return torch.load(file, weights_only=False)

    return result
