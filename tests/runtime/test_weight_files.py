"""Files of weights that are damaged, told by name before anything is computed with them."""

import json
import shutil

import pytest
import torch
from toy_evaluation import sharp_olmo2
from toy_trl import tokenizer

from hf_sam import commands
from hf_sam.runtime.models import check_model, find_model
from hf_sam.runtime.weight_files import check_finite, check_weights


@pytest.fixture
def sharded(tmp_path):
    """A model in several files."""
    sharp_olmo2().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(path.read_bytes()[:8] + b"not a header" + path.read_bytes()[20:])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, garble, lengthen, remove])
def test_the_file_is_named(sharded, damage):
    check_weights(sharded)
    path = sorted(sharded.glob("*.safetensors"))[1]
    damage(path)
    says = "is missing, but 'model.safetensors.index.json' names it" if damage is remove else "is damaged or truncated"
    for check in (check_weights, lambda folder: find_model(str(folder)), lambda folder: check_model(str(folder))):
        with pytest.raises(ValueError, match=says) as caught:
            check(sharded)
        assert repr(str(path)) in str(caught.value)


def test_an_index_that_lies_is_reported(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(one for one in index["weight_map"].values() if one != file)
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: other}}))
    with pytest.raises(ValueError, match=f"{other}' lacks 1 of the weights that 'model.saf.*.json' names.*'{name}'"):
        check_weights(sharded)
    for content in ("{", "{}", '{"weight_map": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json' is damaged: it has no readable weight_map"):
            check_weights(sharded)


@pytest.mark.parametrize("broken", ["tuned2", "adapter", "base of the adapter"])
def test_hf_sam_evaluate_states_it_before_anything_is_measured(shelf, tmp_path, capsys, broken):
    for name in ("base", "tuned1", "tuned2", "adapter"):
        shutil.copytree(shelf / name, tmp_path / name)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    file = {"adapter": "adapter/adapter_model.safetensors", "base of the adapter": "base/model.safetensors"}.get(
        broken, f"{broken}/model.safetensors"
    )
    truncate(tmp_path / file)
    base = "tuned1" if broken == "base of the adapter" else "base"
    argv = ["--base", tmp_path / base, "--tuned", tmp_path / "tuned2", tmp_path / "adapter"]
    argv += ["--data", shelf / "old.jsonl", "--max_length", "64", "--output", tmp_path / "out"]
    assert commands.main(["evaluate", *map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / file}' is damaged or truncated" in line
    assert not list(tmp_path.glob("out/parts/*.json"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    model = sharp_olmo2()
    check_finite(model, "it")
    model.lm_head.weight.data[3, 3] = value
    with pytest.raises(FloatingPointError, match=r"weights of 'it' are .* first in 'lm_head\.weight'"):
        check_finite(model, "it")
    model.save_pretrained(tmp_path)
    with pytest.raises(FloatingPointError, match=f"weights of '{tmp_path.name}' are not finite"):
        find_model(str(tmp_path)).load(torch.float32)
