"""The spec's sections: every key, its type, its range, its default.

Names are the method's and the libraries' own. The models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deft_ray.spec.domains import Domain, Scalar

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
#: Below 1e-9 hardly any activation is near enough to zero to feel the loss; above 1 all but the largest count as zero.
Epsilon = Annotated[float, Field(ge=1e-9, le=1.0)]
#: A worker's random state starts at seed x 1,000,003 + rank, which has to fit 64 bits.
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which pretrained base, and how it lies in memory. One base per sweep."""

    name: str = "nano"
    family: Literal["t5", "bert", "roberta", "opt", "gpt2", "vit"] | None = None
    revision: str | None = None
    quantization: Literal["none", "nf4"] = "none"
    double_quant: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation: Literal["stock", "fused", "relu"] = "stock"
    wo: Literal["nf4", "bfloat16", "float32"] | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_half(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise ValueError("float16 overflows in T5 and in the density loss; use 'bfloat16' or 'float32'")
        return value


class OwnSection(Section):
    """A task in the user's own files: texts and a label, or question, context and answer; each names a column.

    Args:
        train: Training file, ``.parquet``, ``.jsonl`` or ``.csv``; relative to ``data.dir`` if that is given.
        validation: Validation file.
        text: Column of the text, or two columns of a pair.
        label: Column of the label.
        labels: Class names in order; the column holds the names or their numbers from 0. None for a regression.
        question: Column of the question.
        context: Column of the text that answers it.
        answer: Column of the answer, or of a list of right answers.
        metric: The score; None for accuracy, or F1 where questions are asked.
    """

    train: str
    validation: str
    text: str | list[str] | None = None
    label: str | None = None
    labels: list[str] | None = None
    question: str | None = None
    context: str | None = None
    answer: str | None = None
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] | None = None


class DataSection(Section):
    """Which tasks, from where, how much of them, how long.

    A context that is longer than ``max_source_tokens`` allows is cut into windows, of which two neighbours share
    ``window_overlap_tokens``; None is a third of ``max_source_tokens``, which is 128 at the paper's 384.
    """

    tasks: Annotated[list[str], Field(min_length=1)]
    dir: str | None = None
    train_examples: Positive | None = None
    validation_examples: Positive | None = None
    own: dict[str, OwnSection] = {}
    max_source_tokens: Annotated[int, Field(ge=8)] = 128
    window_overlap_tokens: Annotated[int, Field(ge=0)] | None = None
    max_target_tokens: Annotated[int, Field(ge=2)] = 30
    padding: Literal["longest", "max_length"] = "longest"
    grouping: Literal["length", "none"] = "length"


class AdapterSection(Section):
    """The trained part; which leaves a kind has, :data:`~deft_ray.spec.catalog.ADAPTER_LEAVES` says."""

    kind: Literal["lora", "bottleneck", "prefix", "prompt"] = "lora"
    r: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    reduction_factor: Positive = 16
    reads: Literal["mlp", "sum"] = "mlp"
    virtual_tokens: Positive = 60
    head: Literal["own", "two-layer"] = "own"


class DeftSection(Section):
    """The density loss: task loss + alpha x density, its approximation of "non-zero", and ADA-DEFT's layer scales.

    Args:
        loss_of: What the approximation is taken of: each activation, or the feature map, that is each neuron's mean
            over the tokens of a worker's micro-batch.
    """

    loss_of: Literal["activations", "feature_map"] = "activations"
    approximation: Literal["auto", "l0", "tanh", "sigmoid", "l1", "l2"] = "auto"
    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    alpha_decoder: Annotated[float, Field(ge=0.0)] | None = None
    alpha_delay: Share = 0.0
    alpha_ramp: Share = 0.0
    epsilon: Epsilon = 1e-7
    epsilon_end: Epsilon | None = None
    beta: Annotated[float, Field(gt=0.0)] | None = None
    count_padding: bool = False
    adaptive: bool = False
    lambda_init: Share = 0.8
    lambda_noise: Annotated[float, Field(ge=0.0)] = 0.05
    lambda_learning_rate: Annotated[float, Field(gt=0.0)] = 0.01


class DialSection(Section):
    """The threshold dial: every trained model is also scored with small activations set to zero.

    Args:
        taus: Thresholds; activations with magnitude of at most τ become zero, in every block. Empty for no dial.
        calibration_examples: Training examples that no trial is trained on: on them it is chosen which τ of a trial
            stand beside it.
    """

    taus: list[Annotated[float, Field(gt=0.0)]] = []
    calibration_examples: Positive = 256


class TrainSection(Section):
    """How one trial is trained.

    Args:
        max_time_s: Seconds of its own after which a trial fails: of start-up, steps, evaluations and saving; of a pass
            that several share each has an equal part. Looked at after every step.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    batch_size: Positive = 32
    micro_batch_size: Positive | None = None
    eval_batch_size: Positive = 64
    optimizer: Literal["adamw", "paged_adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    schedule: Literal["linear", "constant"] = "linear"
    warmup_share: Share = 0.06
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    gradient_checkpointing: bool = False
    evaluations: Positive = 1
    checkpoint_every_s: Annotated[float, Field(ge=0.0)] = 60.0
    max_time_s: Annotated[float, Field(gt=0.0)] | None = None


class SearchSection(Section):
    """What is sampled, how often, with which seeds.

    Args:
        path: ``alpha``: points are not sampled, but the trained baseline is trained on at rising α, each point from the
            one before it.
        path_share: Steps of a point of the path, as a share of ``train.steps`` or ``train.epochs``.
    """

    trials: Annotated[int, Field(ge=0)] = 8
    scope: Literal["per-task", "shared"] = "per-task"
    sampler: Literal["mo_tpe", "tpe", "nsga2", "gp", "random", "grid"] = "mo_tpe"
    startup_trials: Positive = 10
    path: Literal["alpha"] | None = None
    path_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    seed: Seed = 0
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    front_seeds: Annotated[int, Field(ge=2)] | None = None
    try_first: list[dict[str, Scalar]] = []
    warm_start: list[str] = []
    scheduler: Literal["none", "mo_asha", "asha"] = "none"
    first_rung: Annotated[float, Field(gt=0.0, lt=1.0)] = 1 / 9
    reduction_factor: Annotated[float, Field(ge=1.5)] = 3.0
    max_concurrent: Positive | None = None
    objectives: dict[str, Literal["max", "min"]] = {"score": "max", "density": "min"}

    @field_validator("objectives", mode="before")
    @classmethod
    def _with_directions(cls, value: Any) -> Any:
        if isinstance(value, list) or (isinstance(value, dict) and None in value.values()):
            raise ValueError("every objective needs its direction: {score: max, density: min}")
        return value


class ConstraintSection(Section):
    """What may not get worse."""

    max_score_drop: Annotated[float, Field(ge=0.0)] | None = None


class ReferenceSection(Section):
    """Reference point of the hypervolume: worse than whatever may stand on a front, in the score and in the density."""

    score: Annotated[float, Field(ge=-1.0, lt=1.0)] = 0.0
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @property
    def point(self) -> tuple[float, float]:
        """Score and density."""
        return self.score, self.density


class BudgetSection(Section):
    """When no new trial starts, beside ``search.trials``; None is no limit.

    Args:
        wall_hours: Hours since the command was started; a resumed sweep has them anew.
        gpu_hours: Hours of trials times the GPUs of a host; of trials that share passes, each one's part of them.
        steps: Training steps of all trials.
        stall_trials: Sampled points of each task in a row by which no hypervolume has grown by ``stall_growth``.
        stall_growth: In units of the hypervolume, which is at most 1 with the default reference point.
    """

    wall_hours: Annotated[float, Field(gt=0.0)] | None = None
    gpu_hours: Annotated[float, Field(gt=0.0)] | None = None
    steps: Positive | None = None
    stall_trials: Positive | None = None
    stall_growth: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-3


class ResourcesSection(Section):
    """Hosts: worker groups that each hold one copy of the base and serve trials.

    Args:
        hosts: Worker groups; ``auto`` for as many as there is room for.
        workers_per_host: Workers of each.
        cpus_per_worker: CPUs of each.
        gpus_per_worker: GPUs of each; None for one where there are any.
        slots_per_host: Trials that train at once on one base, in passes that they share where that costs less; ``auto``
            for as many as memory holds and as make a difference.
    """

    hosts: Positive | Literal["auto"] = 1
    workers_per_host: Positive = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] | None = None
    slots_per_host: Positive | Literal["auto"] = 1


class TrackingSection(Section):
    """Where MLflow runs go; None is a SQLite file in the run directory."""

    uri: str | None = None
    experiment: str = "deft_ray"


class SweepSpec(Section):
    """A whole spec, checked.

    The searched leaves hold a stand-in value in their section; their domains are in ``space`` by dotted name.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    model: ModelSection = ModelSection()
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    deft: DeftSection = DeftSection()
    dial: DialSection = DialSection()
    train: TrainSection
    search: SearchSection = SearchSection()
    constraint: ConstraintSection = ConstraintSection()
    reference: ReferenceSection = ReferenceSection()
    budget: BudgetSection = BudgetSection()
    resources: ResourcesSection = ResourcesSection()
    tracking: TrackingSection = TrackingSection()
    baseline: dict[str, Scalar] = {}
    storage: str | None = None
    space: dict[str, Domain] = {}

    @property
    def family(self) -> str:
        """The model's family; resolved when the spec is loaded."""
        assert self.model.family is not None
        return self.model.family


class TrialSpec(Section):
    """One trial, every leaf a value.

    Args:
        trial: Id, unique in the sweep: ``t0007``.
        task: Name of the task.
        seed: Seed of adapter init, data order and dropout.
        baseline: True for the trial of the same task and seed with the density loss off.
        rungs: Shares of its steps at which the scheduler judges it.
        setting: The trial that has the same settings with the first seed.
        judged_at: Threshold of the score and density that the search is about; 0 for exact zeros.
        start_from: Trial whose adapter it trains on; empty where it begins with a fresh one.
        steps_before: Steps for which it was trained before, where its length is in steps.
        epochs_before: Epochs, where it is in epochs.
    """

    trial: str
    task: str
    seed: int
    baseline: bool
    rungs: tuple[float, ...] = ()
    setting: str = ""
    judged_at: float = 0.0
    start_from: str = ""
    steps_before: int = 0
    epochs_before: float = 0.0
    dial: DialSection = DialSection()
    model: ModelSection
    data: DataSection
    adapter: AdapterSection
    deft: DeftSection
    train: TrainSection

    def flat(self) -> dict[str, Scalar | None]:
        """Return the trial's leaves by dotted name, lists joined by commas."""
        return {
            dotted: value
            for section in ("model", "data", "adapter", "deft", "dial", "train")
            for dotted, value in _leaves(section, getattr(self, section).model_dump())
        }


def _leaves(dotted: str, value: Any) -> Iterator[tuple[str, Scalar | None]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(f"{dotted}.{key}", below)
    else:
        yield dotted, ",".join(map(str, value)) if isinstance(value, list) else value
