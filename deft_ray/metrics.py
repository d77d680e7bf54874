"""Every metric key once: name, unit, direction, meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One quantity that a trial reports.

    Args:
        key: Name in records, MLflow and plots.
        unit: Unit in words.
        direction: ``up`` if more is better, ``down`` if less is better, ``none`` otherwise.
        meaning: One sentence.
    """

    key: str
    unit: str
    direction: str
    meaning: str


def tau_key(tau: float) -> str:
    """Write a threshold as it stands in records, MLflow and objectives.

    >>> tau_key(0.10), tau_key(1e-5)
    ('0.1', '1e-05')
    """
    return f"{tau:g}"


METRICS: tuple[Metric, ...] = (
    Metric("score", "fraction", "up", "the task's own metric on the validation split"),
    Metric("density", "fraction", "down", "non-zero MLP activations over all, real tokens, exact zeros"),
    Metric("density_encoder", "fraction", "down", "the same over the encoder's layers only"),
    Metric("density_decoder", "fraction", "down", "the same over the decoder's layers only (teacher-forced)"),
    Metric("density_decoder_generated", "fraction", "down", "the same while the decoder writes its answers"),
    Metric("density_paper", "fraction", "down", "the same with the padding of its batches counted"),
    Metric("density_feature_map", "fraction", "down", "share of neurons that any real token makes non-zero"),
    Metric("score_drop", "fraction", "down", "baseline score minus score, same task and seed"),
    Metric("density_change", "fraction", "up", "(baseline density - density) / baseline density, same task and seed"),
    Metric("loss", "nats", "down", "training loss of the step, density term included"),
    Metric("task_loss", "nats", "down", "training loss of the task alone"),
    Metric("density_loss", "fraction", "down", "smooth density before its weight alpha"),
    Metric("learning_rate", "1", "none", "learning rate of the step"),
    Metric("trainable_share", "fraction", "none", "trainable parameters over all parameters"),
    Metric("startup_s", "s", "down", "from taking the trial to its first training step"),
    Metric("train_s", "s", "down", "training steps; of passes that trials share, its part"),
    Metric("eval_s", "s", "down", "evaluations"),
    Metric("wall_s", "s", "down", "from taking the trial to its last row"),
    Metric("peak_memory_gib", "GiB", "down", "peak memory of the fullest worker"),
    Metric("hypervolume", "fraction", "up", "area dominated by the front, as far as the spec's reference point"),
)
