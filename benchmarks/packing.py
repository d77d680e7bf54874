"""Several trials in one pass of a frozen base, beside one after the other.

    python benchmarks/packing.py [--shape base] [--quantization nf4] [--dtype float32] [--rounds 9]

A T5 with random weights, or the embedded one (``--shape nano``), batches without padding, LoRA on every linear layer
and the density loss, AdamW under DeepSpeed. In every round, in turn: one slot that has the base to itself makes a step
for each of so many trials, as a warm host does that runs one at a time, and so many slots make one each in one pass.
For ``routing``, four slots with a quarter of a batch each step in one pass, and one slot with the whole batch. Each
round puts them on the base anew; their third steps are timed. For ``evaluation``, one of four slots is evaluated, in
batches of 64, while the others train: seconds of each piece over those of the step of the others before it, with
pieces that keep to a step's length, as a host has them, and with whole batches. Answers are written by the embedded
model alone, which can read. Ratios are taken within a round. Peak memory of the first round's step is stored: on a GPU
of torch's allocator, on a CPU of the process.

The makespan of a whole sweep is in makespan.py, as it takes Ray: one slot, several, and one fit per trial in one run.
Needs DeepSpeed beside torch, transformers, peft and bitsandbytes; no Ray.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from density_loss import ratio, timed
from shapes import SHAPES, build_t5
from store import RESULTS, origin, store, summary

sys.path.insert(0, str(Path(__file__).parents[1]))
from deft_ray.models.base import Base, load_base
from deft_ray.models.families import FAMILIES, find_sites
from deft_ray.spec.catalog import NANO, find_task
from deft_ray.spec.schema import AdapterSection, DataSection, DeftSection, ModelSection, TrainSection, TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.train.cost import TRIED, Room
from deft_ray.train.loading import load_task
from deft_ray.train.memory import DeviceMemory
from deft_ray.train.pack import Pack
from deft_ray.train.ranks import start_single
from deft_ray.train.slot import Slot, step_together

SLOTS = (1, 2, 4, 8)
TASK, QUESTION = "nano-sentiment", "nano-question"


class Bench:
    """A base and slots on it.

    Args:
        asked: Of the command line.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.ranks = start_single()
        if asked.shape == NANO:
            how = {"quantization": asked.quantization, "dtype": asked.dtype, "device": self.ranks.device}
            self.base = load_base(NANO, "t5", **how)
            return
        dtype = getattr(torch, asked.dtype)
        model = build_t5(asked.shape, quantization=asked.quantization, dtype=dtype, device=self.ranks.device)
        family = FAMILIES["t5"]
        sites = find_sites(model, family)
        self.base = Base(model, None, family, sites, asked.dtype, type(sites[0].module).__name__)

    def passes(self, slots: int, rows: int) -> dict[str, Any]:
        """Time a step of each of so many slots, in turn: one after the other on a warm host of one, and in one pass."""
        memory, ways = DeviceMemory(self.ranks.device), {"one_by_one": (1, one_by_one), "together": (slots, together)}
        seconds, peaks = {way: list[float]() for way in ways}, dict[str, float]()
        for number in range(self.asked.rounds + 1):
            for way, (at_once, step) in ways.items():
                with self.warm(at_once, rows, step) as opened:
                    memory.begin_peak()
                    stepping = opened * (slots // at_once)
                    took = timed(lambda step=step, stepping=stepping: step(stepping), self.ranks.device)
                    peak = memory.peak / 2**30
                if number:
                    seconds[way].append(took)
                else:  # later ones take what those before them have left, too
                    peaks[way] = peak
        return {
            "s": {way: summary(times) for way, times in seconds.items()},
            "peak_gib": peaks,
            "one_by_one_over_together": ratio(seconds["one_by_one"], seconds["together"]),
        }

    def routing(self, rows: int, quarters: int = 4) -> dict[str, Any]:
        """Time slots that share out a batch beside one slot that has all of it, in turn: the third step of each.

        By the clock, and by the seconds in which this process computes, which neighbours on the machine move less.
        """
        ways = {"four_quarters": (quarters, rows // quarters, together), "one_whole": (1, rows, one_by_one)}
        seconds, computing = ({way: list[float]() for way in ways} for _ in range(2))
        for number in range(2 * self.asked.rounds + 1):
            for way, (slots, each, step) in ways.items():
                with self.warm(slots, each, step) as opened:
                    began = time.process_time()
                    took = timed(lambda step=step, opened=opened: step(opened), self.ranks.device)
                    if number:
                        seconds[way].append(took)
                        computing[way].append(time.process_time() - began)
        return {
            "slots": quarters,
            "s": {way: summary(times) for way, times in seconds.items()},
            "four_quarters_over_one_whole": ratio(seconds["four_quarters"], seconds["one_whole"]),
            "cpu_seconds": ratio(computing["four_quarters"], computing["one_whole"]),
        }

    @contextmanager
    def warm(self, slots: int, rows: int, step: Callable[[list[Slot]], None]) -> Iterator[list[Slot]]:
        """Put so many slots on the base; they have stepped twice by then, and leave it in the end."""
        pack = Pack(self.base)
        opened = [
            Slot(self.trial(number, rows), self.base, self.data(number, rows), self.ranks, pack=pack)
            for number in range(slots)
        ]
        for _ in range(2):
            step(opened)
        yield opened
        for slot in opened:
            slot.close()

    def evaluation(self, rows: int) -> dict[str, Any]:
        """Time what the slots that train wait for while one is evaluated, beside what they wait for each other."""
        return {task: self._evaluation(rows, task) for task in (TASK, QUESTION)[: 2 if self.asked.shape == NANO else 1]}

    def _evaluation(self, rows: int, task: str) -> dict[str, Any]:
        pack, opened = Pack(self.base), list[Slot]()
        for number in range(4):
            data = self.task(task) if self.asked.shape == NANO else self.data(number, rows)
            opened.append(Slot(self.trial(number, rows, task), self.base, data, self.ranks, pack=pack))
        for _ in range(4 * TRIED):  # the pack learns what passes cost
            check(step_together([(slot, False) for slot in opened]))
        ways: dict[str, Callable[[], Room | None]] = {"pieces": pack.cost.room, "whole_batches": lambda: None}
        over: dict[str, list[float]] = {way: [] for way in ways}
        waited: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(self.asked.rounds):
            for way, room in ways.items():
                pieces, goes_on, wait = opened[0].evaluation(room=room), True, 0.0
                while goes_on:
                    step_s = timed(lambda: check(step_together([(s, False) for s in opened[1:]])), self.ranks.device)
                    began = time.perf_counter()
                    goes_on = next(pieces, self) is None
                    took = time.perf_counter() - began
                    over[way] += [took / step_s] if goes_on else []
                    wait += took
                waited[way].append(wait)
        for slot in opened:
            slot.close()
        return {
            way: {
                "pieces": len(over[way]) // self.asked.rounds,
                "piece_over_step": {
                    **summary(over[way]),
                    "share_above_1": sum(r > 1 for r in over[way]) / len(over[way]),
                },
                "evaluation_s": summary(waited[way]),
            }
            for way in ways
        }

    def task(self, name: str) -> EncodedTask:
        """Return a task of the embedded model."""
        return load_task(name, DataSection(tasks=[name], train_examples=256, validation_examples=64), self.base)

    def trial(self, number: int, rows: int, task: str = TASK) -> TrialSpec:
        """Return a trial that differs from the others in its seed, α and ε."""
        asked = self.asked
        return TrialSpec(
            trial=f"t{number:04d}",
            task=task,
            seed=number,
            baseline=False,
            model=ModelSection(family="t5", quantization=asked.quantization, dtype=asked.dtype),
            data=DataSection(tasks=[task]),
            adapter=AdapterSection(r=16, lora_alpha=32.0),
            deft=DeftSection(alpha=0.1 * (number + 1), epsilon=10.0 ** -(number % 4 + 3)),
            train=TrainSection(
                steps=10**6, batch_size=rows, learning_rate=1e-5, gradient_checkpointing=asked.checkpointing
            ),
        )

    def data(self, number: int, rows: int) -> EncodedTask:
        """Return examples of one length."""
        dice, vocabulary = random.Random(number), self.base.model.config.vocab_size

        def tokens(count: int) -> list[int]:
            return [dice.randrange(3, vocabulary) for _ in range(count)]

        examples = [Example(tokens(self.asked.source), tokens(self.asked.target), 0.0) for _ in range(4 * rows)]
        answers = [tokens(self.asked.target) for _ in range(2)]
        validation = [Example(tokens(self.asked.source), answers[place % 2], float(place % 2)) for place in range(64)]
        return EncodedTask(find_task(TASK, DataSection(tasks=[TASK])), examples, validation, answers, [0.0, 1.0])


def one_by_one(slots: list[Slot]) -> None:
    """Step every slot in a pass of its own."""
    for slot in slots:
        check(step_together([(slot, False)]))


def together(slots: list[Slot]) -> None:
    """Step all slots in one pass, whatever it is expected to cost."""
    slots[0].pack.cost.groups = lambda sizes: [list(range(len(sizes)))]  # type: ignore[method-assign]
    check(step_together([(slot, False) for slot in slots]))


def check(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


def main() -> None:
    """Measure all of it and store it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=(*SHAPES, NANO), default="base")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="nf4")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--source", type=int, default=64, help="tokens of a source")
    parser.add_argument("--target", type=int, default=4, help="tokens of an answer")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", default="slots,routing,evaluation", help="which to measure; others' figures stay")
    parser.add_argument("--slots", default=",".join(map(str, SLOTS)), help="how many, by commas")
    asked = parser.parse_args()
    bench = Bench(asked)
    kind = f"{asked.shape}_{asked.quantization}_{asked.dtype}" + ("_checkpointed" if asked.checkpointing else "")
    name = f"packing_{kind}_{'gpu' if torch.cuda.is_available() else 'cpu'}"
    file = RESULTS / f"{name}.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    measures = {
        "slots": lambda: measure_slots(bench),
        "routing": lambda: bench.routing(asked.rows),
        "evaluation": lambda: bench.evaluation(asked.rows),
    }
    settings = {key: value for key, value in vars(asked).items() if key != "parts"}
    parts = {part: stored[part] for part in measures if part in stored}
    for part in asked.parts.split(","):
        parts[part] = {"measured": {**origin(), "settings": settings}, **measures[part]()}
    store(name, parts)


def measure_slots(bench: Bench) -> dict[str, Any]:
    """Measure passes of so many slots each, and what a trial takes of memory."""
    asked, steps = bench.asked, []
    for slots in map(int, asked.slots.split(",")):
        found = bench.passes(slots, asked.rows)
        tokens = slots * asked.rows * (asked.source + asked.target)
        steps.append(
            {
                "slots": slots,
                **found,
                "tokens_per_s": {way: tokens / times["median"] for way, times in found["s"].items()},
            }
        )
        print(slots, steps[-1]["one_by_one_over_together"], flush=True)
    fewest, most = steps[0], steps[-1]
    each = [min(fewest["peak_gib"].values()) / fewest["slots"], most["peak_gib"]["together"] / most["slots"]]
    memory = {"gib_per_trial_fewest_slots": each[0], "gib_per_trial_most_slots": each[1], "ratio": each[1] / each[0]}
    return {"steps": steps, "memory": memory}


if __name__ == "__main__":
    main()
