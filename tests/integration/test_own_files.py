"""Tasks in the user's own files through the command: read before anything starts, trained, and continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from deft_ray.nano.tasks import generate
from tests.integration.sweeps import records, sweep

SPEC = """
name: own
data:
  dir: {folder}
  tasks: [reviews, faq]
  max_source_tokens: 44
  own:
    reviews: {{train: reviews-train.csv, validation: reviews-validation.csv, text: body, label: stars,
               labels: [bad, good], metric: f1}}
    faq: {{train: faq-train.jsonl, validation: faq-validation.jsonl, question: q, context: c, answer: a}}
train: {{steps: 2, batch_size: 8}}
search: {{trials: 0}}
resources: {{workers_per_host: 2}}
"""


def write_files(folder: Path) -> None:
    """Reviews as CSV with the classes' names, and questions as JSON lines, whose contexts are of two facts each."""
    for split, count in (("train", 40), ("validation", 20)):
        with (folder / f"reviews-{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["body", "stars"])
            for row in generate("nano-sentiment", split, count):
                writer.writerow([row["sentence"], ("bad", "good")[row["label"]]])
        rows = generate("nano-question", split, count)
        lines = [
            json.dumps({"q": row["question"], "c": f"{row['context']} {other['context']}", "a": row["answers"]["text"]})
            for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        ]
        (folder / f"faq-{split}.jsonl").write_text("\n".join(lines) + "\n")


def test_own_files_are_swept_over_two_workers(tmp_path: Path) -> None:
    write_files(tmp_path)
    spec, output = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(SPEC.format(folder=tmp_path))
    reviews = tmp_path / "reviews-train.csv"
    good = reviews.read_text()
    reviews.write_text(good + "a dull film,so-so\n")
    done = sweep(spec, output)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr == (
        f'{reviews}: data.own.reviews.train: row 41: unknown label (got "so-so"); allowed: bad, good, or 0 to 1\n'
    )
    assert not output.exists()

    reviews.write_text(good)
    done = sweep(spec, output)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {record["task"]: record for record in records(output)}
    assert {task: record["status"] for task, record in found.items()} == {"reviews": "complete", "faq": "complete"}
    assert (found["reviews"]["score_metric"], list(found["reviews"]["extra_scores"])) == ("f1", ["accuracy"])
    assert (found["faq"]["score_metric"], list(found["faq"]["extra_scores"])) == ("f1", ["exact_match"])
    assert all(0 < record["density"] < 1 for record in found.values())
    assert found["faq"]["config"]["data.own.faq.train"] == str(tmp_path / "faq-train.jsonl")
    assert (output / "pareto-reviews.csv").is_file()

    again = sweep(spec, output, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(records(output)) == 2
