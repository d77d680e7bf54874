"""Evaluation of what is more than one row in, one prediction out: windows, splits beside the score, own files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import OwnSection, TrialSpec
from deft_ray.tasks import scoring
from deft_ray.train.cost import Room
from deft_ray.train.evaluation import Evaluation, Pieces
from deft_ray.train.loading import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.plain_peft import reopened
from tests.slots import check_density, new_slot, run, shaken, start_worker, word_overlap
from tests.tiny import glue_rows, squad_rows, tiny_trial, write_glue

Row = dict[str, Any]
Open = Callable[[TrialSpec], Slot]

LENGTH, WRITTEN = 50, 6
#: Spread of an adapter's random weights at which what the model writes hangs on what it reads.
SPREAD = 1.0


# --- windows ----------------------------------------------------------------------------------------------------------


def long_squad_rows(split: str, count: int) -> list[Row]:
    """Questions of which two of three have several contexts after each other: they fit into no source."""
    dice, rows = random.Random(split), squad_rows(split, count * 4)
    made = []
    for index in range(count):
        row, *others = rows[index * 4 : index * 4 + 4]
        before = [other["context"] for other in others[: dice.randint(0, 3)]] if index % 3 else []
        after = [other["context"] for other in others[len(before) :]] if index % 3 else []
        shift = sum(len(text) + 1 for text in before)
        answers = {**row["answers"], "answer_start": [start + shift for start in row["answers"]["answer_start"]]}
        made.append({**row, "context": " ".join([*before, row["context"], *after]), "answers": answers})
    return made


@pytest.fixture(scope="module")
def long_squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    (folder / "squad").mkdir()
    for split, count in (("train", 20), ("validation", 13)):
        pq.write_table(pa.Table.from_pylist(long_squad_rows(split, count)), folder / "squad" / f"{split}.parquet")
    return folder


def long_trial(model: Path, data: Path) -> TrialSpec:
    return tiny_trial(
        model,
        "t5",
        data,
        "squad",
        data__max_source_tokens=LENGTH,
        data__max_target_tokens=WRITTEN,
        train__steps=12,
        train__batch_size=10,
        train__learning_rate=0.02,
    )


def oracle_answers(
    slot: Slot, rows: list[Row], model: Any, tokenizer: Any, counts: Any
) -> list[list[tuple[float, str]]]:
    """What plain PEFT writes for each window of each row, one unpadded window at a time, and how sure it is."""
    written: list[list[tuple[float, str]]] = [[] for _ in rows]
    for window in slot.data.validation:
        gold = rows[window.row]["answers"]["text"][0]
        source = {"input_ids": torch.tensor([window.input_ids]), "attention_mask": torch.ones(1, len(window.input_ids))}
        counts.on = True
        model(**source, labels=tokenizer(gold, return_tensors="pt")["input_ids"])
        counts.on = False
        out = model.generate(
            **source,
            max_new_tokens=WRITTEN,
            do_sample=False,
            num_beams=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        sure = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0].mean()
        written[window.row].append((float(sure), tokenizer.decode(out.sequences[0], skip_special_tokens=True)))
    return written


@pytest.mark.parametrize("state", ["trained", "shaken"])
@torch.no_grad()
def test_a_question_is_scored_once_by_its_surest_window_and_counted_in_all(
    open_slot: Open,
    tiny_models: dict[str, Path],
    long_squad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """A trained model's answers end early and are padded; a shaken one's hang on the window."""
    seen: dict[str, Any] = {}

    def choose(asked: list[int], answers: list[scoring.Answer]) -> dict[int, str]:
        seen["sureness"] = [answer.sureness for answer in answers]
        seen["said"] = scoring.surest_answers(asked, answers)
        return seen["said"]  # type: ignore[no-any-return]

    monkeypatch.setattr("deft_ray.train.evaluation.surest_answers", choose)
    slot = open_slot(long_trial(tiny_models["dry-t5"], long_squad))
    if state == "shaken":
        shaken(slot, SPREAD, seed=1)
    else:
        with torch.enable_grad():
            run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate(last=True)

    tokenizer, model, counts = reopened(tiny_models["dry-t5"], tmp_path, None)
    rows = long_squad_rows("validation", 13)
    written = [
        [(mean if text.strip() else -float("inf"), text) for mean, text in mine]  # no words are least sure
        for mine in oracle_answers(slot, rows, model, tokenizer, counts)
    ]
    check_density(found, counts)
    windows = [len(mine) for mine in written]
    assert min(windows) == 1
    assert max(windows) > 2
    for window, sureness, (want, _) in zip(slot.data.validation, seen["sureness"], chain(*written), strict=True):
        if window.windows > 1:
            assert sureness == pytest.approx(want, abs=2e-4)
    texts = [max(mine, key=lambda answer: answer[0])[1] for mine in written]
    assert list(seen["said"].values()) == texts
    if state == "shaken":
        assert texts != [mine[-1][1] for mine in written], "the last window is not always the surest"
        assert texts != [mine[0][1] for mine in written], "nor is the first"
    points = [
        max(word_overlap(text, gold) for gold in row["answers"]["text"]) for text, row in zip(texts, rows, strict=True)
    ]
    assert found.scores["f1"] == pytest.approx(sum(points) / 13, abs=1e-6)
    assert found.predictions == {"0": pytest.approx(points, abs=1e-6)}


def test_windows_in_which_nothing_is_written_are_the_least_sure(
    open_slot: Open, tiny_models: dict[str, Path], long_squad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row of each batch begins with padding and ends there; the others write one token over and over."""
    slot = open_slot(long_trial(tiny_models["dry-t5"], long_squad))
    seen: list[scoring.Answer] = []

    def nothing_first(**options: Any) -> torch.Tensor:
        rows = len(options["attention_mask"])
        return torch.tensor([[0, 0, 0, 0], *([[0, 40, 40, 1]] * (rows - 1))])

    def choose(asked: list[int], answers: list[scoring.Answer]) -> dict[int, str]:
        seen.extend(answers)
        return scoring.surest_answers(asked, answers)

    monkeypatch.setattr("deft_ray.train.evaluation.surest_answers", choose)
    monkeypatch.setattr(slot.base.model, "generate", nothing_first)
    assert slot.evaluate().scores["f1"] == 0.0
    for answer, window in zip(seen, slot.data.validation, strict=True):
        if window.windows > 1:
            assert (answer.text == "") == (answer.sureness == -float("inf"))
            assert answer.sureness < 0
    assert {answer.text for answer in seen} >= {""}


def test_sureness_that_is_no_number_is_not_compared(
    open_slot: Open, tiny_models: dict[str, Path], long_squad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = open_slot(long_trial(tiny_models["dry-t5"], long_squad))
    monkeypatch.setattr(
        "deft_ray.train.evaluation.token_log_likelihood", lambda logits, _labels: torch.full((len(logits),), torch.nan)
    )
    with pytest.raises(FloatingPointError, match=r"^the model's outputs are not finite in the evaluation$"):
        slot.evaluate()


#: For short pieces: one example each, and two tokens of an answer.
TIGHT = Room(most=100.0, fixed=40.0, each=1.0)


def evaluate_shaken(spec: TrialSpec, base: Base, ranks: Ranks, room: Room | None = None) -> dict[str, Any]:
    """Evaluate a slot whose adapter does something."""
    slot = shaken(new_slot(spec, base, ranks), SPREAD, seed=1)
    found, _ = at_the_end(slot.evaluation(last=True, room=lambda: ranks.share(room)))
    left = {"counts": found.counts.rows, "used": found.counts.density_feature_map(), "scores": found.scores}
    slot.close()
    return left


def work(rank: int, folder: Path, model: Path, specs: list[TrialSpec]) -> None:
    """One of two workers."""
    ranks = start_worker(rank, 2, folder)
    base = load_base(str(model), "t5")
    found = [evaluate_shaken(spec, base, ranks, room) for spec in specs for room in (None, TIGHT)]
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_score_questions_and_splits_as_one_does(
    tiny_models: dict[str, Path],
    long_squad: Path,
    mismatched: Path,
    base_of: Callable[[TrialSpec], Base],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    squad = long_trial(tiny_models["dry-t5"], long_squad)
    mnli = tiny_trial(tiny_models["dry-t5"], "t5", mismatched, "mnli", train__batch_size=6)
    spawn(work, args=(tmp_path, tiny_models["dry-t5"], [squad, mnli]), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2))

    for index, spec in enumerate((squad, squad, mnli, mnli)):
        alone = evaluate_shaken(spec, base_of(spec), ranks)
        assert first[index]["scores"] == second[index]["scores"] == pytest.approx(alone["scores"], abs=1e-6)
        assert torch.equal(first[index]["counts"], second[index]["counts"])
        assert torch.equal(first[index]["counts"][:, 1], alone["counts"][:, 1])
        assert first[index]["used"] == second[index]["used"] == pytest.approx(alone["used"], abs=5e-3)
    validation = load_task("squad", squad.data, base_of(squad)).validation
    order = sorted(range(len(validation)), key=lambda index: (-len(validation[index].input_ids), index))
    rank_of = {place: number // squad.train.eval_batch_size % 2 for number, place in enumerate(order)}
    homes = [{rank_of[n] for n, example in enumerate(validation) if example.row == row} for row in range(13)]
    assert {0, 1} in homes, "a question's windows were on both workers"


def at_the_end(pieces: Pieces) -> tuple[Evaluation, int]:
    """What an evaluation in pieces finds, and how many there were."""
    count = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value, count
        count += 1


@pytest.mark.parametrize(("name", "task", "fewest"), [("t5", "squad", 60), ("t5", "mnli", 28), ("bert", "mnli", 12)])
def test_shorter_pieces_find_the_same(
    open_slot: Open, tiny_models: dict[str, Path], long_squad: Path, mismatched: Path, name: str, task: str, fewest: int
) -> None:
    """While others wait: fewer rows, and answers a few tokens at a time."""
    model = tiny_models[f"dry-{name}"]
    spec = long_trial(model, long_squad) if task == "squad" else tiny_trial(model, name, mismatched, task)
    slot = shaken(open_slot(spec), SPREAD, seed=1)
    want, few = at_the_end(slot.evaluation(last=True))
    got, many = at_the_end(slot.evaluation(last=True, room=lambda: TIGHT))

    assert few < fewest <= many
    assert got.scores == want.scores
    assert got.predictions == want.predictions
    assert torch.equal(got.counts.rows[:, [1, 3]], want.counts.rows[:, [1, 3]]), "padded as the batch is"
    assert got.counts.rows[:, 0].tolist() == pytest.approx(want.counts.rows[:, 0].tolist(), rel=1e-4)
    assert got.generated.tolist() == pytest.approx(want.generated.tolist(), rel=1e-4)


# --- MNLI's mismatched rows -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI with mismatched rows."""
    folder = write_glue(tmp_path_factory.mktemp("mnli"), ["mnli"], rows=18, validation_rows=11)
    write_mnli(folder, "validation_mismatched", glue_rows("mnli", "mismatched", 17))
    return folder


def write_mnli(folder: Path, split: str, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "glue" / "mnli" / f"{split}.parquet")


@pytest.mark.parametrize("name", ["dry-t5", "bert"])
def test_mismatched_rows_are_scored_beside_and_counted_nowhere(
    open_slot: Open, tiny_models: dict[str, Path], mismatched: Path, tmp_path: Path, name: str
) -> None:
    """Against the same adapter on folders in which the mismatched rows are the matched ones, or not there."""
    without = write_glue(tmp_path / "without", ["mnli"], rows=18, validation_rows=11)
    swapped = write_glue(tmp_path / "swapped", ["mnli"], rows=18, validation_rows=11)
    write_mnli(swapped, "validation_matched", glue_rows("mnli", "mismatched", 17))
    found = []
    for folder in (mismatched, without, swapped):
        family = name.split("-")[-1]
        slot = open_slot(tiny_trial(tiny_models[name], family, folder, "mnli", train__steps=3))
        for _ in range(3):
            slot.step()
        found.append(slot.evaluate())
    both, matched, mismatched_only = found

    assert list(both.scores) == ["accuracy", "accuracy_mismatched"]
    assert matched.scores == {"accuracy": both.scores["accuracy"]}
    assert mismatched_only.scores == {"accuracy": both.scores["accuracy_mismatched"]}
    assert torch.equal(both.counts.rows, matched.counts.rows)
    assert not torch.equal(both.counts.rows, mismatched_only.counts.rows)
    row = both.row()
    assert (row["score"], row["score_metric"]) == (both.scores["accuracy"], "accuracy")
    assert row["extra_scores"] == {"accuracy_mismatched": both.scores["accuracy_mismatched"]}


#: What the GLUE benchmark reports for each task: the score, and what stands beside it.
GLUE_METRICS = {
    "cola": ["matthews", "accuracy"],
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
    "qqp": ["accuracy", "f1"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
}


@pytest.mark.parametrize("task", list(GLUE_METRICS))
def test_each_glue_task_has_its_metrics(
    open_slot: Open, tiny_models: dict[str, Path], tiny_data: Path, task: str
) -> None:
    evaluation = open_slot(tiny_trial(tiny_models["bert"], "bert", tiny_data, task)).evaluate(last=True)
    row, said = evaluation.row(), evaluation.predictions
    assert scoring.score_labels(GLUE_METRICS[task], said["0"], said["label"]).items() <= evaluation.scores.items()
    assert [row["score_metric"], *row["extra_scores"]] == GLUE_METRICS[task]


# --- own files --------------------------------------------------------------------------------------------------------


def trained(open_slot: Open, spec: TrialSpec) -> tuple[list[float], dict[str, float], torch.Tensor]:
    slot = open_slot(spec)
    losses = run(slot)
    found = slot.evaluate()
    return losses, found.scores, found.counts.rows


def assert_same_run(one: Any, other: Any) -> None:
    assert one[:2] == other[:2]
    assert torch.equal(one[2], other[2])


def test_own_files_with_known_rows_train_and_score_as_the_known_task(
    open_slot: Open, tiny_models: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 30), ("validation", 14)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["same", "left", "right"])
            for row in glue_rows("rte", split, count):
                writer.writerow([("yes", "no")[row["label"]], row["sentence1"], row["sentence2"]])
    own = OwnSection(
        train="train.csv", validation="validation.csv", text=["left", "right"], label="same", labels=["yes", "no"]
    )
    known = tiny_trial(tiny_models["bert"], "bert", tiny_data, "rte")
    mine = tiny_trial(tiny_models["bert"], "bert", tmp_path, "pairs", data__own={"pairs": own})
    want = trained(open_slot, known)

    assert_same_run(trained(open_slot, mine), want)
    f1 = own.model_copy(update={"metric": "f1"})
    with_f1 = mine.model_copy(update={"data": mine.data.model_copy(update={"own": {"pairs": f1}})})
    _, scores, _ = trained(open_slot, with_f1)
    assert list(scores) == ["f1", "accuracy"]
    assert scores["accuracy"] == want[1]["accuracy"]


def test_own_similarities_train_and_score_as_the_known_task(
    open_slot: Open, tiny_models: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 30), ("validation", 14)):
        rows = [{"a": r["sentence1"], "b": r["sentence2"], "like": r["label"]} for r in glue_rows("stsb", split, count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    own = OwnSection(
        train="train.parquet", validation="validation.parquet", text=["a", "b"], label="like", metric="pearson"
    )
    known = tiny_trial(tiny_models["bert"], "bert", tiny_data, "stsb")
    mine = tiny_trial(tiny_models["bert"], "bert", tmp_path, "like", data__own={"like": own})

    assert_same_run(trained(open_slot, mine), trained(open_slot, known))


def test_own_questions_train_and_score_as_squad_does(
    open_slot: Open, tiny_models: dict[str, Path], long_squad: Path, tmp_path: Path
) -> None:
    """Long contexts too: the windows come from the answer's text, which stands once in each of these."""
    for split, count in (("train", 20), ("validation", 13)):
        rows = [
            {"who": row["question"], "where": row["context"], "what": row["answers"]}
            for row in long_squad_rows(split, count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = OwnSection(train="train.jsonl", validation="validation.jsonl", question="who", context="where", answer="what")
    known = long_trial(tiny_models["dry-t5"], long_squad)
    data = known.data.model_copy(update={"tasks": ["faq"], "dir": str(tmp_path), "own": {"faq": own}})
    mine = known.model_copy(update={"task": "faq", "data": data})

    assert_same_run(trained(open_slot, mine), trained(open_slot, known))


def test_own_classes_are_answered_in_their_own_words(
    open_slot: Open, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"body": row["sentence"], "stars": row["label"]} for row in glue_rows("sst2", "train", 20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    own = OwnSection(
        train="rows.parquet", validation="rows.parquet", text="body", label="stars", labels=["one star", "five"]
    )
    spec = tiny_trial(tiny_models["dry-t5"], "t5", tmp_path, "reviews", data__own={"reviews": own}, train__steps=2)
    slot = open_slot(spec)
    tokenizer = slot.base.tokenizer
    for row, example in zip(rows, slot.data.train, strict=True):
        assert tokenizer.decode(example.input_ids) == f"reviews body: {row['body']}</s>"
        assert tokenizer.decode(example.target_ids) == ("one star", "five")[row["stars"]] + "</s>"
    slot.step()
    assert list(slot.evaluate().scores) == ["accuracy"]
