"""Which checkpoint a run resumes from, when it was killed while it wrote one."""

import json

import pytest
import torch

from hf_sam.runtime.checkpoints import complete, last_complete


def write(folder, ranks: int = 2):
    """A checkpoint of two processes, as far as completeness is concerned."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    record = {"attributes": {"world_size": ranks, "data": None}}
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"CheckpointRecord": record}}))
    return folder


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: cut(folder / "trainer_state.json"),
        lambda folder: (folder / "rng_state_1.pth").unlink(),
        lambda folder: cut(folder / "rng_state_1.pth"),
    ],
    ids=["no state", "half a state", "no random states", "half of the random states"],
)
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, damage):
    earlier, last = write(tmp_path / "checkpoint-8"), write(tmp_path / "checkpoint-16")
    assert last_complete(tmp_path) == str(last)
    damage(last)
    assert last_complete(tmp_path) == str(earlier)
    assert complete(last) is None
    assert complete(earlier) == str(earlier)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-last").mkdir()
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "absent") is None
