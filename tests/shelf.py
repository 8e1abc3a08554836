"""Models and data on disk, as the command line names them."""

from pathlib import Path

from toy_evaluation import moved, sharp_olmo2
from toy_trl import rows, tokenizer


def fill(folder: Path) -> Path:
    """A base, three tuned models, an adapter, and data of several forms."""
    from peft import LoraConfig, get_peft_model

    base = sharp_olmo2(initializer_range=0.1)
    models = {"base": base, **{f"tuned{i}": moved(base, 0.01 * i, seed=i) for i in (1, 2, 3)}}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    # The adapter finds its base by the path that it was made from.
    base.config._name_or_path = str(folder / "base")
    base.name_or_path = str(folder / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    rows("text").to_json(folder / "old.jsonl")
    rows("completion").to_json(folder / "task.jsonl")
    rows("text").to_parquet(folder / "old.parquet")
    rows("text").save_to_disk(folder / "saved")
    (folder / "old.txt").write_text("\n\n".join(row["text"] for row in rows("text")))
    (folder / "splits").mkdir()
    rows("text").to_json(folder / "splits" / "train.jsonl")
    rows("text", count=8).to_json(folder / "splits" / "test.jsonl")
    return folder
