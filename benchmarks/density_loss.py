"""What the density loss costs: time and memory of a training step, and time of an evaluation.

    python benchmarks/density_loss.py --shape base
    python benchmarks/density_loss.py --shape xl --quantization nf4 --dtype bfloat16     on a GPU
    python benchmarks/density_loss.py --shape base --parts evaluation --rounds 40        the rest stays as it is stored

Every way of training is run in turn, again and again, so that a slow stretch of the machine falls on all of them alike;
every other round goes backwards. One way is there twice, as a control: what the machine alone makes of a ratio.
A ratio is the median over rounds of the ratio within a round: by the clock and, where its name ends in ``cpu_s``, by
the seconds in which this process computes, which other work on a machine touches less. Needs torch, transformers, peft
and bitsandbytes, with or without NF4, and nothing else of the project's dependencies: neither Ray nor DeepSpeed.

Rows here have no padding. What batches of like length save is in padding.py, which needs data and a tokenizer: share
of padding, real tokens per second, and that an example's loss is the same either way.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from shapes import SHAPES, build_t5, random_batch
from store import RESULTS, origin, store, summary
from torch import Tensor

from deft_ray.density import activation
from deft_ray.density.approximations import L0
from deft_ray.density.counts import Counter, DensityCounts, StepCounts, WithFirst
from deft_ray.density.probe import DensityProbe, Penalty
from deft_ray.density.scales import LayerScales
from deft_ray.models.families import FAMILIES, find_sites
from deft_ray.models.halves import decode, encode, first_tokens, generate, new_cache

EPSILON = 1e-3
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
PARTS = ("saved_for_backward", "steps", "evaluation", "added_to_steps", "added_to_evaluation")
AIMS = {
    "step over alpha = 0": "at most 1.03",
    "bytes beyond alpha = 0": 0,
    "fused over stock, bytes of the activation part": "at most 0.5",
    "evaluation with counting": "at most 1.05",
}
#: Of the evaluation by likelihood: classes, and tokens of each one's answer.
CLASSES, ANSWER = 3, 2


@dataclass(frozen=True)
class Way:
    """A way of training.

    Args:
        alpha: Weight of the density loss.
        fused: Whether the gated block is one function.
        naive: Dtype in which collected activations become a loss, as the authors' code does it (``None``: our way).
        adaptive: Whether every block has a layer scale.
    """

    alpha: float
    fused: bool = False
    naive: str | None = None
    adaptive: bool = False


WAYS = {
    "peft": Way(0.0),
    "peft_again": Way(0.0),
    "deft": Way(1.0),
    "fused_peft": Way(0.0, fused=True),
    "fused_deft": Way(1.0, fused=True),
    "naive": Way(1.0, naive="activation"),
    "naive_float32": Way(1.0, naive="float32"),
    "ada_peft": Way(0.0, adaptive=True),
    "ada_deft": Way(1.0, adaptive=True),
}
#: Ways over the one that has the same but the loss. The first is the control: what the machine alone makes of a ratio.
OVER_ALPHA_0 = {
    "peft_again": "peft",
    "deft": "peft",
    "fused_deft": "fused_peft",
    "naive": "peft",
    "naive_float32": "peft",
    "ada_deft": "ada_peft",
}


class Trainer:
    """A frozen base with LoRA on all linear layers and AdamW: one step at a time, in any way."""

    def __init__(self, base: Any, batch: dict[str, Tensor]) -> None:
        self.sites = find_sites(base, FAMILIES["t5"])
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
        self.base, self.model, self.batch = base, get_peft_model(base, config).train(), batch
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)
        self.masks = {"encoder": batch["attention_mask"], "decoder": torch.ones_like(batch["labels"])}

    @contextmanager
    def checkpointing(self, kind: str) -> Iterator[None]:
        if kind == "none":
            yield
            return
        reentrant = kind == "reentrant"
        hooks = []
        if reentrant:  # its inputs have to require a gradient, or the first block of each stack gets none
            embeddings = [self.base.encoder.embed_tokens, self.base.decoder.embed_tokens]
            hooks = [e.register_forward_hook(lambda _m, _i, out: out.requires_grad_()) for e in embeddings[:1]]
        self.base.activation_checkpointing_enable({"use_reentrant": reentrant})
        try:
            yield
        finally:
            self.base.activation_checkpointing_disable()
            for hook in hooks:
                hook.remove()

    @contextmanager
    def using(self, way: Way) -> Iterator[Callable[[], Tensor]]:
        """Put on the model what a way needs; gives its forward pass, which returns the loss."""
        with ExitStack() as stack:
            if way.naive is not None:
                yield self._naive(way, stack)
                return
            probe = DensityProbe(self.sites, fused=way.fused)
            stack.callback(probe.remove)
            scales = None
            if way.adaptive:
                device = self.batch["labels"].device
                scales = LayerScales(self.sites, init=0.8, noise=0.05, device=device)
                stack.callback(scales.remove)
            weights = {"encoder": way.alpha, "decoder": way.alpha}
            stack.enter_context(probe.penalising(Penalty(L0(EPSILON), weights, self.masks, scales=scales)))
            yield lambda: self.model(**self.batch).loss

    def _naive(self, way: Way, stack: ExitStack) -> Callable[[], Tensor]:
        acts: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
        for site in self.sites:
            handle = site.module.register_forward_hook(lambda _m, _i, out, side=site.side: acts[side].append(out))
            stack.callback(handle.remove)

        def forward() -> Tensor:
            for side in acts.values():
                side.clear()
            loss: Tensor = self.model(**self.batch).loss
            for side in acts.values():
                cast = [act.float() if way.naive == "float32" else act for act in side]
                means = [(act**2 / (act**2 + EPSILON)).mean(dim=[1, 2]) for act in cast]
                loss = loss + way.alpha * torch.cat(means).mean()
            return loss

        return forward

    def step(self, forward: Callable[[], Tensor]) -> None:
        """Train one step."""
        forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_bytes(self, way: Way) -> tuple[int, int]:
        """Bytes that autograd keeps, each storage once, parameters left out.

        Returns:
            Between forward and backward pass; and what all blocks that are computed again keep then, together.
        """
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        def total() -> int:
            return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

        with self.using(way) as forward, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = forward()
            before = total()
            loss.backward()  # what is kept is held until the end, so no address is seen twice
            after = total()
        self.optimizer.zero_grad()
        return before, after - before


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds that an action takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed_twice(action: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds that an action takes by the clock, and in which this process computes, on all its threads."""
    began = time.process_time()
    seconds = timed(action, device)
    return seconds, time.process_time() - began


def measure_steps(trainer: Trainer, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time every way under every kind of checkpointing, in turn."""
    figures: dict[str, Any] = {}
    for kind in CHECKPOINTING:
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        computing: dict[str, list[float]] = {name: [] for name in WAYS}
        peaks: dict[str, float] = {}
        with trainer.checkpointing(kind):
            for number in range(rounds + 1):
                for name in _in_turn(WAYS, number):
                    way = WAYS[name]
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    with trainer.using(way) as forward:
                        seconds, cpu_s = timed_twice(lambda forward=forward: trainer.step(forward), device)
                    if number:  # the first round warms up
                        times[name].append(seconds)
                        computing[name].append(cpu_s)
                    if device.type == "cuda":
                        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        figures[kind] = {
            "step_s": {name: summary(values) for name, values in times.items()},
            "over_alpha_0": {name: ratio(times[name], times[without]) for name, without in OVER_ALPHA_0.items()},
            "over_alpha_0_cpu_s": {
                name: ratio(computing[name], computing[without]) for name, without in OVER_ALPHA_0.items()
            },
            "fused_deft_over_stock_peft": ratio(times["fused_deft"], times["peft"]),
            **({"peak_memory_gib": peaks} if peaks else {}),
        }
    return figures


def measure_saved(trainer: Trainer) -> dict[str, Any]:
    """Bytes kept for the backward pass under every kind of checkpointing: of the model, and per activation of the MLPs.

    Under checkpointing, what is kept when the forward pass has ended and, of the reentrant kind, what blocks keep while
    they are computed again; the other kind keeps hold of that itself.
    """
    elements = sum(int(mask.numel()) * _d_ff(trainer) * _layers(trainer, side) for side, mask in trainer.masks.items())
    figures: dict[str, Any] = {"activations": elements}
    for kind in CHECKPOINTING:
        with trainer.checkpointing(kind):
            found = {name: trainer.saved_bytes(way) for name, way in WAYS.items()}
        figures[kind] = _kept({name: forward for name, (forward, _) in found.items()}, elements)
        if kind == "reentrant":
            figures["inside reentrant blocks"] = _kept({name: again for name, (_, again) in found.items()}, elements)
    return figures


def _kept(whole: dict[str, int], elements: int) -> dict[str, Any]:
    return {
        "mib": {name: round(value / 2**20, 1) for name, value in whole.items()},
        "bytes_per_activation_beyond_peft": {
            name: round((value - whole["peft"]) / elements, 2) for name, value in whole.items()
        },
    }


def _d_ff(trainer: Trainer) -> int:
    return int(trainer.base.config.d_ff)


def _layers(trainer: Trainer, side: str) -> int:
    return sum(site.side == side for site in trainer.sites)


class Stopwatch:
    """Adds up the seconds of what is timed by it; what is timed within that counts once."""

    def __init__(self) -> None:
        self.seconds, self._running = 0.0, False

    @contextmanager
    def timing(self) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running, began = True, time.perf_counter()
        try:
            yield
        finally:
            self._running = False
            self.seconds += time.perf_counter() - began

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def watched(*given: Any, **options: Any) -> Any:
            with self.timing():
                return function(*given, **options)

        return watched


@dataclass(frozen=True)
class Timed:
    """A counter whose work is timed."""

    counter: Counter
    watch: Stopwatch

    def add(self, *shown: Any) -> None:
        with self.watch.timing():
            self.counter.add(*shown)


class Evaluations:
    """Evaluations with exact counting and without: one forward pass, by likelihood, by generation.

    As :mod:`deft_ray.train.evaluation` does it: ``counting`` in a trial's evaluations but the last, and
    ``counting_with_map``, which notes the neurons that are ever non-zero too, in the last. An answer that is generated
    is counted while it is written, and the given one, which nobody would pass through the decoder but for its density,
    is passed and counted beside it.

    Args:
        trainer: Whose model.
        device: Where it is.
        question: Tokens of a source whose answer is generated.

    Attributes:
        watch: Times what counting adds to an evaluation, where it is done.
        times_first_step: Whether to time a written answer's first step, in whose place the given one's pass is.
        first_step_s: Seconds that it took in the last evaluation with counts, which is that much longer.
    """

    def __init__(self, trainer: Trainer, device: torch.device, question: int) -> None:
        self.probe, self.batch, self.model = DensityProbe(trainer.sites), trainer.batch, trainer.model.eval()
        self.device, self.masks, self.watch = device, trainer.masks, Stopwatch()
        self.times_first_step, self.first_step_s = False, 0.0
        rows, self.length = self.batch["labels"].shape
        self.source = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        self.asked = {name: random_batch(rows, question, self.length, device)[name] for name in self.source}

    def ways(self) -> dict[str, dict[str, Callable[[], None]]]:
        """Ways by kind of evaluation."""
        return {
            action.__name__: {
                "plain": partial(action, None),
                "plain_again": partial(action, None),
                "counting": partial(self._counted, action, False),
                "counting_with_map": partial(self._counted, action, True),
            }
            for action in (self.forward, self.likelihood, self.generation)
        }

    def _counted(self, action: Callable[[DensityCounts | None], None], feature_map: bool) -> None:
        self.watch.seconds = self.first_step_s = 0.0
        counts = DensityCounts.empty(self.probe.names, self.device, feature_map=feature_map)
        action(counts)
        with self.watch.timing():
            counts.density()
            counts.density_feature_map()

    def _counting(
        self, counts: Counter | None, masks: Mapping[str, Tensor], there: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[None]:
        return nullcontext() if counts is None else self.probe.counting(Timed(counts, self.watch), masks, there)

    def forward(self, counts: DensityCounts | None) -> None:
        with self._counting(counts, self.masks):
            self.model(**self.batch)

    def likelihood(self, counts: DensityCounts | None) -> None:
        answers = self.batch["labels"][:, :ANSWER].repeat_interleave(CLASSES, dim=0)
        mask = self.source["attention_mask"].repeat_interleave(CLASSES, dim=0)
        gold = (torch.arange(len(answers), device=self.device) % CLASSES == 0).long().unsqueeze(1).expand_as(answers)
        with self._counting(counts, self.masks):
            encoded = encode(self.model, self.source)
        with self._counting(counts, {"decoder": gold}, {"decoder": gold}):
            decode(self.model, encoded.last_hidden_state.repeat_interleave(CLASSES, dim=0), mask, answers)

    def generation(self, counts: DensityCounts | None) -> None:
        mask, given = self.asked["attention_mask"], self.batch["labels"]
        with self._counting(counts, {"encoder": mask}):
            encoded = encode(self.model, self.asked)
        cache = new_cache(self.model)
        if counts is None:
            generate(self.model, encoded, self.asked, self.length, cache)
            return
        written = StepCounts()
        with self._counting(WithFirst(counts, written), self.masks), self.watch.timing():
            logits = decode(self.model, encoded.last_hidden_state, mask, given, cache, first_only=True)
        if self.times_first_step:
            first = partial(decode, self.model, encoded.last_hidden_state, mask, given[:, :1], new_cache(self.model))
            self.first_step_s = timed(first, self.device)
        with self._counting(written, self.masks):
            first = first_tokens(self.model, logits, cache)
            tokens = generate(self.model, encoded, self.asked, self.length, cache, first)
        with self.watch.timing():
            written.total(torch.full((len(tokens),), tokens.shape[1] - 1, device=self.device))


@contextmanager
def evaluations(trainer: Trainer, device: torch.device, question: int) -> Iterator[Evaluations]:
    """Give the evaluations of a model; it trains again afterwards."""
    found = Evaluations(trainer, device, question)
    try:
        with torch.no_grad():
            yield found
    finally:
        found.probe.remove()
        trainer.model.train()


def measure_evaluation(trainer: Trainer, device: torch.device, rounds: int, question: int) -> dict[str, Any]:
    """Time evaluations with exact counting and without, in turn."""
    with evaluations(trainer, device, question) as found:
        return {kind: _over_plain(ways, device, rounds) for kind, ways in found.ways().items()}


def measure_added_to_steps(trainer: Trainer, rounds: int) -> dict[str, Any]:
    """Time on a CPU what the loss adds to a step where it is done: blocks' questions, slopes added to their gradients.

    The ratio is of the step over the step less that, in one run: no other work on the machine turns it into its
    opposite. What caches forget meanwhile is not in it.
    """
    watch, figures = Stopwatch(), dict[str, Any]()
    with ExitStack() as stack:
        for where, name in ((DensityProbe, "_observe"), (activation, "_injected")):
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, watch.around(getattr(where, name)))
        for kind in CHECKPOINTING:
            ratios: dict[str, list[float]] = {name: [] for name in ("deft", "fused_deft", "ada_deft")}
            with trainer.checkpointing(kind):
                for number in range(rounds + 1):
                    for name, found in ratios.items():
                        with trainer.using(WAYS[name]) as forward:
                            watch.seconds = 0.0
                            seconds = timed(partial(trainer.step, forward), torch.device("cpu"))
                        if number:  # the first round warms up
                            found.append(seconds / (seconds - watch.seconds))
            figures[kind] = {name: summary(found) for name, found in ratios.items()}
    return figures


def measure_added_to_evaluation(trainer: Trainer, rounds: int, question: int) -> dict[str, Any]:
    """Time in the same way what an evaluation is longer for counts.

    Counting, and the pass of the given answer less the first step of the written one, which goes on from it.
    """
    figures = dict[str, Any]()
    with evaluations(trainer, torch.device("cpu"), question) as done:
        done.times_first_step = True
        for kind, ways in done.ways().items():
            ratios: dict[str, list[float]] = {name: [] for name in ways if name.startswith("counting")}
            for number in range(rounds + 1):
                for name in _in_turn(ratios, number):
                    whole = timed(ways[name], torch.device("cpu")) - done.first_step_s
                    if number:
                        ratios[name].append(whole / (whole - done.watch.seconds + done.first_step_s))
            figures[kind] = {name: summary(found) for name, found in ratios.items()}
    return figures


def _over_plain(ways: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, Any]:
    """Time the ways in turn; each one but ``plain`` over that one too, ``plain_again`` as a control."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    computing: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in _in_turn(ways, number):
            seconds, cpu_s = timed_twice(ways[name], device)
            if number:  # the first round warms up
                times[name].append(seconds)
                computing[name].append(cpu_s)
    over = {f"{name}_over_plain": ratio(times[name], times["plain"]) for name in ways if name != "plain"}
    by_cpu = {
        f"{name}_over_plain_cpu_s": ratio(computing[name], computing["plain"]) for name in ways if name != "plain"
    }
    return {"s": {name: summary(values) for name, values in times.items()}, **over, **by_cpu}


def _in_turn(names: Iterable[str], number: int) -> list[str]:
    """Return names in their order, and in every other round in the reverse: what precedes a way falls on none alone."""
    return list(names)[:: 1 if number % 2 else -1]


def ratio(above: list[float], below: list[float]) -> dict[str, float | int]:
    """Summary of the ratios within rounds."""
    return summary([one / other for one, other in zip(above, below, strict=True)])


def main() -> None:
    """Measure all of it and store it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--source", type=int, default=128, help="tokens of a source")
    parser.add_argument("--question", type=int, default=384, help="tokens of a source whose answer is generated")
    parser.add_argument("--target", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma between them")
    asked = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    dtype = getattr(torch, asked.dtype)
    base = build_t5(asked.shape, quantization=asked.quantization, dtype=dtype, device=device)
    trainer = Trainer(base, random_batch(asked.rows, asked.source, asked.target, device))
    measures = {
        "saved_for_backward": partial(measure_saved, trainer),
        "steps": partial(measure_steps, trainer, device, asked.rounds),
        "evaluation": partial(measure_evaluation, trainer, device, asked.rounds, asked.question),
        "added_to_steps": partial(measure_added_to_steps, trainer, asked.rounds),
        "added_to_evaluation": partial(measure_added_to_evaluation, trainer, asked.rounds, asked.question),
    }
    place = "gpu" if device.type == "cuda" else "cpu"
    name = f"density_loss_{asked.shape}_{asked.quantization}_{asked.dtype}_{place}"
    file = RESULTS / f"{name}.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}
    on = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    shape = {key: value for key, value in vars(asked).items() if key != "parts"}
    for part in asked.parts.split(","):
        if part.startswith("added") and device.type == "cuda":
            continue  # a GPU works on while it is asked
        figures[part] = {"measured": {**origin(), **on, "shape": shape}, **measures[part]()}
    store(name, {**{part: figures[part] for part in PARTS if part in figures}, "aims": AIMS})


if __name__ == "__main__":
    main()
