"""Evaluate a slot: exact density and the task's score over the whole validation split and all ranks.

Text-to-text classes are scored by likelihood: the answer whose tokens are most likely wins, nothing is generated. The
decoder runs once over all candidate answers; density counts the rows of the true answer only, which is what teacher
forcing sees. Questions are answered by greedy generation; density is counted under teacher forcing beside it, over
every window of a context. A question with several windows gets the answer that the model is surest of, wherever its
windows were evaluated.

Shape suffixes: B batch, C candidates, D d_model, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import EncoderDecoderCache

from deft_ray.density.counts import DensityCounts, StepCounts, WithFirst
from deft_ray.density.masks import with_virtual_positions
from deft_ray.density.probe import DensityProbe
from deft_ray.metrics import tau_key
from deft_ray.models.adapters import virtual_positions
from deft_ray.models.base import Base
from deft_ray.models.halves import decode, encode, first_tokens, generate_in_pieces, new_cache
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.tasks.kept import labels_of, source_lengths
from deft_ray.tasks.scoring import Answer, score_answers, score_labels, surest_answers
from deft_ray.train.batches import IGNORED, pad, source_mask, source_tensors
from deft_ray.train.cost import Room, Size
from deft_ray.train.ranks import Ranks

Prediction = float | Answer


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, over all ranks.

    Args:
        scores: Fractions by metric, the task's own first.
        counts: Exact counts per layer.
        generated: ``[non-zero, total]`` of the decoder while it wrote its answers; zeros where nothing is generated.
        each: What the model said of each example: a class or a value, and of a question the F1 of its answer; empty
            but in a trial's last evaluation.
        dial: Score and density by threshold, on the validation split, and in the last evaluation on the calibration
            split too; empty without the dial.
        predictions: ``label`` of each validation example, questions excepted, and ``each`` by threshold, 0 among them;
            empty but in the last evaluation.
    """

    scores: dict[str, float]
    counts: DensityCounts
    generated: Tensor
    each: list[float] = field(default_factory=list)
    dial: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: dict[str, list[float]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the fields of a record that an evaluation fills."""
        score_metric, score = next(iter(self.scores.items()))
        return {
            "score": score,
            "score_metric": score_metric,
            "extra_scores": {key: value for key, value in self.scores.items() if key != score_metric},
            "density": self.counts.density(),
            "density_encoder": self.counts.density("encoder"),
            "density_decoder": self.counts.density("decoder"),
            "density_decoder_generated": _ratio(self.generated),
            "density_paper": self.counts.density_paper(),
            "density_feature_map": self.counts.density_feature_map(),
            "density_at_tau": self.counts.density_at_tau(),
            "density_layers": self.counts.density_layers(),
            "dial": self.dial,
        }

    @property
    def point(self) -> tuple[float, float]:
        """Score and density."""
        density = self.counts.density()
        assert density is not None, "a split has tokens"
        return next(iter(self.scores.values())), density


#: An evaluation that pauses after every batch, or every part of one.
Pieces = Generator[None, None, Evaluation]


@dataclass
class _Piece:
    """The piece of an evaluation that comes.

    Attributes:
        room: What it may take; None for no limit.
    """

    room: Room | None = None

    def rows(self, tokens: int) -> int:
        """Return the number of rows of so many tokens each, at least one."""
        return sys.maxsize if self.room is None else max(1, self.room.tokens() // tokens)

    def new_tokens(self, rows: int, most: int) -> int:
        """Return the number of tokens by which so many answers may grow, at least one."""
        return most if self.room is None else self.room.passes(rows)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one slot's model.

    Args:
        base: The base under it.
        model: The PEFT model.
        probe: Counts its activations.
        data: The task.
        ranks: Workers; whole batches are dealt out among them.
        batch_size: Examples per forward pass and worker.
        max_new_tokens: Longest generated answer.
        source_length: Pad sources to this; to the longest of a batch if None.
        target_length: Pad answers to this; to the longest of a batch if None.
        alone: Context of a pass that is this slot's alone.
        room: Tells what the next piece may take while others wait for it; None for no limit but ``batch_size``. It is
            asked once before every piece, on every rank.
    """

    base: Base
    model: PeftModel
    probe: DensityProbe
    data: EncodedTask
    ranks: Ranks
    batch_size: int
    max_new_tokens: int
    source_length: int | None = None
    target_length: int | None = None
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    room: Callable[[], Room | None] = lambda: None

    def evaluate(self, taus: Sequence[float] = (), last: bool = False) -> Evaluation:
        """Evaluate at one go; see :meth:`pieces`."""
        pieces = self.pieces(taus, last)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                found: Evaluation = end.value
                return found

    def pieces(self, taus: Sequence[float] = (), last: bool = False) -> Pieces:
        """Evaluate on the validation split, and on those beside it, a batch or less at a time.

        Between two pieces the model may do something else. Every rank has as many of them, and gets the whole result.

        Args:
            taus: Thresholds of the dial: at each, and at 0, the model is evaluated with all activations of at most this
                magnitude set to zero. Empty for no dial.
            last: Whether the trial ends with it: thresholds are judged on the calibration split too then, and what was
                said of each validation example is kept.

        Raises:
            FloatingPointError: On every rank, if the model says what is no number.
        """
        found = yield from self._evaluate(self.data.validation, 0.0, last)
        scores = dict(found.scores)
        for suffix, examples in self.data.beside.items():  # density is that of the validation split alone
            beside = yield from self._evaluate(examples, 0.0)
            scores |= {f"{metric}_{suffix}": score for metric, score in beside.scores.items()}
        dial, said = dict[str, dict[str, float]](), {tau_key(0.0): found.each} if last else {}
        if last and self.data.task.kind != "question":
            said["label"] = labels_of(self.data.validation)
        for tau in (0.0, *taus) if taus else ():
            dialled = found if tau == 0.0 else (yield from self._evaluate(self.data.validation, tau, last))
            calibrated = (yield from self._evaluate(self.data.calibration, tau)) if last else None
            dial[tau_key(tau)] = {"score": dialled.point[0], "density": dialled.point[1]}
            if calibrated is not None:
                score, density = calibrated.point
                dial[tau_key(tau)] |= {"calibration_score": score, "calibration_density": density}
                said[tau_key(tau)] = dialled.each
        return Evaluation(scores, found.counts, found.generated, found.each, dial, said)

    def _evaluate(self, examples: Sequence[Example], tau: float, each: bool = False) -> Pieces:
        device = self.ranks.device
        counts = DensityCounts.empty(self.probe.names, device, feature_map=each and tau == 0.0)
        generated = torch.zeros(2, dtype=torch.int64, device=device)
        predictions = yield from self._predictions(examples, tau, counts, generated)
        mine = {index: often_F.cpu() for index, often_F in counts.often.items()}
        counts.join(self.ranks.total(counts.rows), self.ranks.gather(mine))
        if any(value != value for value in predictions):
            raise FloatingPointError("the model's outputs are not finite in the evaluation")
        scores, said = self._score(examples, predictions, each)
        return Evaluation(scores, counts, self.ranks.total(generated), said)

    def _predictions(
        self, examples: Sequence[Example], tau: float, counts: DensityCounts, generated: Tensor
    ) -> Generator[None, None, list[Prediction]]:
        """Predict a split, every rank its batches; every rank gets all predictions, in order."""
        mine: dict[int, Prediction] = {}
        batches = self._batches(examples)
        for turn in range(0, len(batches), self.ranks.world):
            place = turn + self.ranks.rank
            indices = batches[place] if place < len(batches) else []  # at the end some have none
            predicted = yield from self._in_pieces([examples[i] for i in indices], tau, counts, generated)
            mine.update(zip(indices, predicted, strict=True))
        everybodys = {index: value for part in self.ranks.gather(mine) for index, value in part.items()}
        return [everybodys[index] for index in range(len(examples))]

    def _in_pieces(
        self, examples: list[Example], tau: float, counts: DensityCounts, generated: Tensor
    ) -> Generator[None, None, list[Prediction]]:
        """Predict a batch, or none, in as many pieces as every rank; what is in a piece is each rank's own matter."""
        piece = _Piece()
        predicting = self._predict(examples, piece, counts, generated)
        predicted: list[Prediction] | None = None
        while True:
            piece.room = self.room()
            with self._passing(tau):
                try:
                    next(predicting)
                except StopIteration as end:
                    predicted = end.value if predicted is None else predicted
            yield
            if not any(self.ranks.maximum(int(predicted is None))):
                assert predicted is not None
                return predicted

    @contextmanager
    def _passing(self, tau: float) -> Iterator[None]:
        """Run a pass inside: without gradients and dropout, at a threshold, and the slot alone."""
        self.model.eval()
        try:
            with torch.no_grad(), self.alone(), self.probe.thresholding(tau):
                yield
        finally:
            self.model.train()

    def _batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Batches of like length, longest first, of all ranks; batch i belongs to rank i modulo world."""
        lengths = source_lengths(examples)
        order = sorted(range(len(examples)), key=lambda index: (-lengths[index], index))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _size(self, examples: list[Example]) -> Size:
        """Rows of a batch, and what they and their answers are padded to, whatever the pieces that it comes in."""
        fixed = self.source_length if examples[0].picture is None else None
        source = max(fixed or 0, *(example.source_tokens for example in examples))
        if not self.base.family.text_to_text:
            return Size(len(examples), source, 0)
        answers = self.data.candidates or [example.target_ids for example in examples]
        return Size(len(examples), source, max(self.target_length or 0, *map(len, answers)))

    def _score(
        self, examples: Sequence[Example], predictions: list[Prediction], each: bool
    ) -> tuple[dict[str, float], list[float]]:
        """Scores by metric, and where they are asked for what was said of each example; see :class:`Evaluation`."""
        metrics = (self.data.task.metric, *self.data.task.extra_metrics)
        if self.data.task.kind == "question":
            answers = [value for value in predictions if isinstance(value, Answer)]
            found = surest_answers([example.row for example in examples], answers)
            gold = {example.row: example.answers for example in examples}
            scores = score_answers(list(found.values()), [gold[row] for row in found])
            one_by_one = [score_answers([text], [gold[row]])["f1"] for row, text in found.items()] if each else []
            return {metric: scores[metric] for metric in metrics}, one_by_one
        values = [value for value in predictions if isinstance(value, float)]
        return score_labels(metrics, values, labels_of(examples)), values if each else []

    def _predict(
        self, examples: list[Example], piece: _Piece, counts: DensityCounts, generated: Tensor
    ) -> Generator[None, None, list[Prediction]]:
        """Predict a batch; between its pieces the model may do something else."""
        predicted = list[Prediction]()
        while len(predicted) < len(examples):
            if predicted:
                yield
            size = self._size(examples)
            each = size.source + size.target * max(1, len(self.data.candidates))
            part = examples[len(predicted) :][: piece.rows(each)]
            predicted += yield from self._predict_part(part, size, piece, counts, generated)
        return predicted

    def _predict_part(
        self, examples: list[Example], size: Size, piece: _Piece, counts: DensityCounts, generated: Tensor
    ) -> Generator[None, None, list[Prediction]]:
        """Predict some rows of a batch of a size, in pieces where answers are written."""
        side = self.base.family.side
        source = source_tensors(examples, self.base.pad_id, size.source, self.ranks.device, side=side)
        masks = with_virtual_positions({side: source_mask(source, examples)}, virtual_positions(self.model))
        if not self.base.family.text_to_text:
            with self.probe.counting(counts, masks):
                logits = self.model(**source).logits.float()
            return _finite_or_nan(logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(dim=-1), logits)
        with self.probe.counting(counts, masks):
            encoded = encode(self.model, source)
        if self.data.task.kind == "question":
            labels = pad([example.target_ids for example in examples], IGNORED, size.target).to(self.ranks.device)
            return (yield from self._generate(examples, source, labels, encoded, piece, counts, generated))
        return self._choose(examples, source["attention_mask"], encoded, counts)

    def _choose(
        self, examples: list[Example], mask_BT: Tensor, encoded: Any, counts: DensityCounts
    ) -> list[Prediction]:
        """Score every candidate answer of every row; take the likeliest class, or the expected value."""
        width, rows = len(self.data.candidates), len(examples)
        labels = pad(self.data.candidates, IGNORED, self.target_length).to(self.ranks.device).repeat(rows, 1)
        gold = torch.tensor([self.data.candidates.index(example.target_ids) for example in examples])
        is_gold = torch.nn.functional.one_hot(gold, width).reshape(-1, 1).to(labels.device)
        masks, there = {"decoder": (labels != IGNORED).long() * is_gold}, {"decoder": is_gold.expand_as(labels)}
        with self.probe.counting(counts, masks, there):
            encoded_BTD = encoded.last_hidden_state.repeat_interleave(width, dim=0)
            logits = decode(self.model, encoded_BTD, mask_BT.repeat_interleave(width, dim=0), labels)
        likelihood_BC = token_log_likelihood(logits, labels).reshape(rows, width)
        values = torch.tensor(self.data.values, device=likelihood_BC.device)
        if self.data.task.kind == "regression":
            return _finite_or_nan((likelihood_BC.softmax(dim=-1) * values).sum(dim=-1), likelihood_BC)
        return _finite_or_nan(values[likelihood_BC.argmax(dim=-1)], likelihood_BC)

    def _generate(
        self,
        examples: list[Example],
        source: dict[str, Tensor],
        labels: Tensor,
        encoded: Any,
        piece: _Piece,
        counts: DensityCounts,
        generated: Tensor,
    ) -> Generator[None, None, list[Prediction]]:
        cache, written = new_cache(self.model), StepCounts()
        with self.probe.counting(WithFirst(counts, written), {"decoder": (labels != IGNORED).long()}):
            logits = decode(
                self.model, encoded.last_hidden_state, source["attention_mask"], labels, cache, first_only=True
            )
        if not logits.isfinite().all():
            return [math.nan] * len(examples)
        first_B = first_tokens(self.model, logits, cache)
        written = StepCounts() if first_B is None else written
        yield
        at_once = partial(piece.new_tokens, len(examples), self.max_new_tokens)
        writing = generate_in_pieces(self.model, encoded, source, self.max_new_tokens, cache, first_B, at_once)
        tokens: Tensor | None = None
        while tokens is None:
            with self.probe.counting(written, {"decoder": labels}):
                try:
                    next(writing)
                except StopIteration as end:
                    tokens = end.value
            yield
        lengths_B = written_lengths(tokens[:, 1:], self.base.tokenizer.eos_token_id)
        generated += written.total(lengths_B)
        texts = self.base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if all(example.windows == 1 for example in examples):
            return [Answer(text, 0.0) for text in texts]
        sureness = self._sureness(tokens[:, 1:], lengths_B, source["attention_mask"], encoded, cache)
        return [
            Answer(text, mean if text.strip() else -math.inf) if mean == mean else math.nan
            for text, mean in zip(texts, sureness, strict=True)
        ]

    def _sureness(
        self, tokens_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor, encoded: Any, cache: EncoderDecoderCache | None
    ) -> list[float]:
        """Mean log-probability of the tokens that were written, the end of the sequence among them, for each row."""
        beyond_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= lengths_B.unsqueeze(1)
        labels = tokens_BT.masked_fill(beyond_BT, IGNORED)
        logits = decode(self.model, encoded.last_hidden_state, mask_BT, labels, cache)
        return [float(mean) for mean in token_log_likelihood(logits, labels) / lengths_B]


def written_lengths(tokens_BT: Tensor, end: int) -> Tensor:
    """Tokens that each row of a generation has written, (B,): up to its first ``end``, or all.

    >>> written_lengths(torch.tensor([[5, 1, 0, 0], [0, 5, 1, 0], [5, 5, 5, 5]]), end=1).tolist()
    [2, 3, 4]
    """
    ended_BT = (tokens_BT == end).cumsum(dim=-1) > 0
    return (~ended_BT).sum(dim=-1) + ended_BT.any(dim=-1)


def _ratio(counts: Tensor) -> float | None:
    return int(counts[0]) / int(counts[1]) if counts[1] else None


def _finite_or_nan(chosen_B: Tensor, scores_BC: Tensor) -> list[Prediction]:
    """What was chosen; no number where a score is none or infinite, as an argmax would hide it."""
    finite_B = scores_BC.isfinite().all(dim=-1)
    return [float(value) if finite else math.nan for value, finite in zip(chosen_B, finite_B, strict=True)]


def token_log_likelihood(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the log-probabilities of each row's labels.

    Args:
        logits_BTV: Decoder logits.
        labels_BT: Token ids; -100 where there is none.

    Returns:
        (B,) float32.
    """
    keep = labels_BT != IGNORED
    log_BTV = logits_BTV.float().log_softmax(dim=-1)
    chosen_BT = log_BTV.gather(-1, labels_BT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen_BT * keep).sum(dim=-1)
