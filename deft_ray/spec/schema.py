"""The spec's sections: every key, its type, its range, its default.

Names are the method's and the libraries' own. The models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deft_ray.spec.domains import Domain, Scalar

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
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
    wo: Literal["nf4", "bfloat16", "float32"] | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_half(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise ValueError("float16 overflows in T5 and in the density loss; use 'bfloat16' or 'float32'")
        return value


class DataSection(Section):
    """Which tasks, from where, how much of them, how long."""

    tasks: Annotated[list[str], Field(min_length=1)]
    dir: str | None = None
    train_examples: Positive | None = None
    validation_examples: Positive | None = None
    max_source_tokens: Annotated[int, Field(ge=8)] = 128
    max_target_tokens: Annotated[int, Field(ge=2)] = 30
    padding: Literal["longest", "max_length"] = "longest"


class AdapterSection(Section):
    """The trained part."""

    kind: Literal["lora"] = "lora"
    r: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class DeftSection(Section):
    """The density loss: task loss + alpha x density, and its approximation of "non-zero"."""

    approximation: Literal["l0", "tanh"] = "l0"
    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    alpha_decoder: Annotated[float, Field(ge=0.0)] | None = None
    epsilon: Annotated[float, Field(ge=1e-9, le=1.0)] = 1e-7
    beta: Annotated[float, Field(gt=0.0)] | None = None


class TrainSection(Section):
    """How one trial is trained."""

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    batch_size: Positive = 32
    micro_batch_size: Positive | None = None
    eval_batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-4
    schedule: Literal["linear", "constant"] = "linear"
    warmup_share: Share = 0.06
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 0
    gradient_checkpointing: bool = False
    evaluations: Positive = 1
    checkpoint_every_s: Annotated[float, Field(ge=0.0)] = 60.0


class SearchSection(Section):
    """What is sampled, how often, with which seeds."""

    trials: Annotated[int, Field(ge=0)] = 8
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    startup_trials: Positive = 10
    seed: Seed = 0
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    try_first: list[dict[str, Scalar]] = []
    max_concurrent: Positive | None = None


class ConstraintSection(Section):
    """What may not get worse."""

    max_score_drop: Annotated[float, Field(ge=0.0)] | None = None


class ResourcesSection(Section):
    """Hosts: worker groups that each hold one copy of the base and serve trials."""

    hosts: Positive | Literal["auto"] = 1
    workers_per_host: Positive = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] | None = None
    slots_per_host: Annotated[int, Field(ge=1, le=1)] = 1


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
    train: TrainSection
    search: SearchSection = SearchSection()
    constraint: ConstraintSection = ConstraintSection()
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
    """

    trial: str
    task: str
    seed: int
    baseline: bool
    model: ModelSection
    data: DataSection
    adapter: AdapterSection
    deft: DeftSection
    train: TrainSection

    def flat(self) -> dict[str, Scalar | None]:
        """Return the trial's leaves by dotted name, lists joined by commas."""
        flat: dict[str, Scalar | None] = {}
        for section in ("model", "data", "adapter", "deft", "train"):
            for key, value in getattr(self, section).model_dump().items():
                flat[f"{section}.{key}"] = ",".join(map(str, value)) if isinstance(value, list) else value
        return flat
