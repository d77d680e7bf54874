"""Problems to search without training: closed forms with known fronts, noise, a score limit and learning curves."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Steps of a whole trial; rungs lie at 9 and 27.
STEPS = 81

Config = Mapping[str, Any]
_DEFAULTS: dict[str, Any] = {
    "deft.approximation": "l0",
    "deft.epsilon": 1e-7,
    "deft.beta": 20.0,
    "deft.adaptive": False,
    "deft.lambda_init": 0.8,
    "train.learning_rate": 2e-3,
}
#: (score, density) of a configuration after so many steps.
Measured = tuple[float, float]


@dataclass(frozen=True)
class Problem:
    """Something to search.

    Args:
        name: Its name.
        deft: The spec's ``deft`` section, with its domains.
        train: Further leaves of ``train``.
        baseline: Values of the baseline for searched leaves of ``train``.
        max_score_drop: The score limit.
        truth: Score and density after so many steps, without noise.
        noise: Standard deviations of score and density.
        finite: Score and density at full length of every configuration, (n, 2), where they are so few.
    """

    name: str
    deft: dict[str, Any]
    train: dict[str, Any]
    baseline: dict[str, Any]
    max_score_drop: float
    truth: Callable[[Config, int], Measured]
    noise: tuple[float, float] = (0.0, 0.0)
    finite: np.ndarray | None = None

    def measure(self, config: Config, steps: int, seed: int) -> Measured:
        """Measure with noise; the same for what is alike and has the same seed."""
        score, density = self.truth(config, steps)
        if self.noise == (0.0, 0.0):
            return score, density
        dice = random.Random(hashlib.sha256(f"{score} {density} {steps} {seed}".encode()).digest())
        noisy = (score + dice.gauss(0.0, self.noise[0]), density + dice.gauss(0.0, self.noise[1]))
        return min(1.0, max(0.0, noisy[0])), min(1.0, max(0.0, noisy[1]))

    def without_loss(self) -> dict[str, Any]:
        """Return the baseline's configuration."""
        return {**_DEFAULTS, **self.baseline, "deft.alpha": 0.0}


def learnt(steps: int, speed: float) -> float:
    """How much of a training is done, from 0 to 1."""
    return (1.0 - math.exp(-speed * steps / STEPS)) / (1.0 - math.exp(-speed))


def _weight(config: Config) -> float:
    """α on a scale on which 0 does nothing and 1 is too much."""
    alpha = float(config["deft.alpha"])
    return 0.0 if alpha == 0.0 else min(1.5, max(0.0, (math.log10(alpha) + 2.0) / 3.0))


def _smooth(config: Config, steps: int) -> Measured:
    """One good valley of ε; the more weight, the less density, and the score gives way late."""
    weight, epsilon = _weight(config), math.log10(float(config["deft.epsilon"]))
    fit = math.exp(-(((epsilon + 4.0) / 1.5) ** 2))
    rate = math.exp(-(((math.log10(float(config["train.learning_rate"])) + 2.7) / 0.4) ** 2))
    score = 0.5 + 0.45 * rate * learnt(steps, 4.0) * (1.0 - 0.6 * weight**3)
    return score, 0.9 - 0.75 * weight * (0.2 + 0.8 * fit) * learnt(steps, 2.0)


def _crossing(config: Config, steps: int) -> Measured:
    """Early leaders lose in the end: a strong loss shows its density at once and its damage late."""
    weight, epsilon = _weight(config), math.log10(float(config["deft.epsilon"]))
    fit = math.exp(-(((epsilon + 2.5 + 2.0 * weight) / 1.0) ** 2))
    done = learnt(steps, 2.0)
    rate = math.exp(-(((math.log10(float(config["train.learning_rate"])) + 2.4) / 0.5) ** 2))
    score = 0.5 + 0.4 * rate * done * (1.0 - 0.9 * (weight * (1.2 - fit)) ** 2 * done)
    return score, 0.95 - 0.8 * weight * fit * learnt(steps, 6.0)


def _ada(config: Config, steps: int) -> Measured:
    """A conditional space: layer scales help where they begin high, tanh-like slopes where they are steep enough."""
    weight = _weight(config)
    if config["deft.approximation"] == "l0":
        fit = math.exp(-(((math.log10(float(config["deft.epsilon"])) + 5.0) / 1.2) ** 2))
    else:
        fit = 0.8 * math.exp(-(((math.log10(float(config["deft.beta"])) - 1.3) / 0.4) ** 2))
    adaptive = bool(config["deft.adaptive"])
    gain = 0.15 * (float(config["deft.lambda_init"]) - 0.5) if adaptive else 0.0
    done = learnt(steps, 3.0)
    score = 0.45 + 0.5 * done * (1.0 - 0.7 * weight**2 * (1.1 - fit)) - (0.02 if adaptive else 0.0)
    return score, 0.9 - done * (0.7 * weight * fit + gain * weight)


_ALPHA = {"alpha": {"loguniform": [0.01, 30.0]}}
_EPSILON = {"epsilon": {"loguniform": [1e-9, 1e-1]}}
_RATE = {"learning_rate": {"loguniform": [1e-4, 1e-1]}}
_RATE_OF_BASELINE = {"train.learning_rate": 2e-3}

PROBLEMS = (
    Problem("smooth", _ALPHA | _EPSILON, _RATE, _RATE_OF_BASELINE, 0.1, _smooth, (0.005, 0.005)),
    Problem("crossing", _ALPHA | _EPSILON, _RATE, {"train.learning_rate": 4e-3}, 0.1, _crossing, (0.005, 0.005)),
    Problem(
        "conditional",
        {
            **_ALPHA,
            **_EPSILON,
            "approximation": {"choice": ["l0", "sigmoid"]},
            "beta": {"loguniform": [1.0, 200.0]},
            "adaptive": {"choice": [False, True]},
            "lambda_init": {"uniform": [0.0, 1.0]},
        },
        {},
        {},
        0.1,
        _ada,
        (0.005, 0.005),
    ),
)


def best_front(problem: Problem, draws: int = 200_000) -> np.ndarray:
    """Feasible values at full length, (n, 2), of every configuration or of so many random ones: the known front.

    Args:
        problem: The problem.
        draws: Configurations.
    """
    dice = random.Random(0)
    base = problem.truth(problem.without_loss(), STEPS)
    leaves = {f"deft.{key}": value for key, value in problem.deft.items()}
    leaves |= {f"train.{key}": value for key, value in problem.train.items()}
    if problem.finite is not None:
        found = problem.finite
    else:
        drawn = ({name: _draw(dice, domain) for name, domain in leaves.items()} for _ in range(draws))
        found = np.array([base, *(problem.truth(config, STEPS) for config in drawn)])
    feasible: np.ndarray = found[found[:, 0] >= base[0] - problem.max_score_drop - 1e-9]
    return feasible


def _draw(dice: random.Random, domain: Any) -> Any:
    kind, args = next(iter(domain.items()))
    if kind == "choice":
        return dice.choice(args)
    if kind == "loguniform":
        return math.exp(dice.uniform(math.log(args[0]), math.log(args[1])))
    return dice.uniform(*args)
