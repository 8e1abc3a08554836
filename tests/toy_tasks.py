"""A benchmark of the harness from local files: 24 questions with 4 choices each."""

import json
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
    train: {folder}/shots.jsonl
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    """Write the task `toy_choice` with its data into a folder, which is returned."""
    questions = [
        {"question": f"w{i} w{i + 1}", "choices": [" w1", " w2", " w3", " w4"], "answer": i % 4} for i in range(40)
    ]
    for name, rows in (("questions", questions[:24]), ("shots", questions[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy.yaml").write_text(TASK.format(name="toy_choice", folder=folder))
    return folder
