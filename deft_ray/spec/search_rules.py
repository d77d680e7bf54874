"""Rules about the search: baselines, seeds, known points, grids, rungs, thresholds and objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator

from deft_ray.metrics import tau_key
from deft_ray.spec.catalog import LAMBDA_LEAVES
from deft_ray.spec.messages import did_you_mean
from deft_ray.spec.resolve import rung_places, shares_of
from deft_ray.spec.schema import SearchSection
from deft_ray.spec.view import View, all_values, is_count, is_number
from deft_ray.spec.yaml_tree import Fault, show

#: Points of a grid, all of which are listed before a sweep starts.
_LARGEST_GRID = 100_000


def _baseline(view: View) -> Iterator[Fault]:
    baseline = view.get("baseline", {})
    if not isinstance(baseline, dict):
        return
    for dotted in view.space:
        if _shapes_baseline(view, dotted) and dotted not in baseline:
            message = f"is searched, so the baseline needs its own value: add '{dotted}: …' under 'baseline:'"
            yield tuple(dotted.split(".")), message
    for dotted in baseline:
        if not _shapes_baseline(view, dotted) or (dotted not in view.space and not view.is_broken(dotted)):
            yield ("baseline", dotted), "is no searched leaf of adapter or train; the baseline takes it from the spec"


def _shapes_baseline(view: View, dotted: str) -> bool:
    """Whether a leaf matters where the density loss is off: of ``deft`` only layer scales', if every trial has them."""
    section, _, leaf = dotted.partition(".")
    return section != "deft" or (leaf in LAMBDA_LEAVES and view.options("deft.adaptive", False) == (True,))


def _seeds(view: View) -> Iterator[Fault]:
    seeds = view.get("search.seeds", [])
    for index, seed in enumerate(seeds if isinstance(seeds, list) else []):
        if seed in seeds[:index]:
            yield ("search", "seeds", index), f"seed stands twice (got {show(seed)})"
    if isinstance(seeds, list) and len(seeds) > 1 and view.get("search.front_seeds") is not None:
        what = f"is for points of one seed (got {show(view.get('search.front_seeds'))})"
        yield ("search", "front_seeds"), f"{what}; search.seeds trains every point with {len(seeds)}"


def _try_first(view: View) -> Iterator[Fault]:
    points = view.get("search.try_first", [])
    for index, point in enumerate(points if isinstance(points, list) else []):
        for dotted, value in point.items() if isinstance(point, dict) else ():
            domain = view.space.get(dotted)
            path = ("search", "try_first", index, dotted)
            if domain is None and not view.is_broken(dotted):
                yield path, f"is not searched; searched are: {', '.join(view.space) or 'none'}"
            elif domain is not None and value not in domain:
                yield path, f"lies outside the domain {domain} (got {show(value)})"


def _warm_start(view: View) -> Iterator[Fault]:
    sampler = view.get("search.sampler", "mo_tpe")
    if view.get("search.warm_start") and sampler in ("grid", "random"):
        message = f"means nothing to the {sampler} sampler, which learns from no point; leave it out"
        yield ("search", "warm_start"), message


def _scope(view: View) -> Iterator[Fault]:
    """Points for all tasks together are one study, and have no task of their own to go on with."""
    if view.get("search.scope", "per-task") != "shared":
        return
    for leaf in ("front_seeds", "warm_start"):
        if view.get(f"search.{leaf}"):
            message = f"is for scope per-task (got {show(view.get(f'search.{leaf}'))}); leave it out"
            yield ("search", leaf), message


def _path(view: View) -> Iterator[Fault]:
    """A path is of rising α and of nothing else, and nobody samples, stops or repeats its points."""
    section = {leaf: field.default for leaf, field in SearchSection.model_fields.items()}
    if view.get("search.path") is None:
        share = view.get("search.path_share")
        if share not in (None, section["path_share"]):
            yield ("search", "path_share"), f"is read by no trial (got {show(share)}); needs search.path: alpha"
        return
    if list(view.space) != ["deft.alpha"]:
        searched = ", ".join(view.space) or "nothing"
        yield ("search", "path"), f"needs deft.alpha as the only leaf that is searched (searched: {searched})"
        return
    domain = view.space["deft.alpha"]
    if domain.kind == "randint":
        yield (
            ("deft", "alpha"),
            f"is no range of whole numbers on a path (got {domain}); allowed: choice, uniform, loguniform",
        )
    elif not all(is_number(value) and float(value) > 0 for value in domain.args):
        yield ("deft", "alpha"), f"must be above 0 on a path, which begins at the baseline's 0 (got {domain})"
    for leaf in ("sampler", "startup_trials", "scheduler", "front_seeds", "warm_start", "try_first"):
        value = view.get(f"search.{leaf}")
        if value not in (None, [], section[leaf]):
            yield (
                ("search", leaf),
                f"means nothing on a path, whose points are all known (got {show(value)}); leave it out",
            )
    for leaf in ("alpha_decoder", "alpha_delay", "alpha_ramp", "epsilon_end"):
        if view.get(f"deft.{leaf}"):
            what = f"means nothing on a path (got {show(view.get(f'deft.{leaf}'))})"
            yield ("deft", leaf), f"{what}: it would begin anew at each point; leave it out"
    if view.get("budget.stall_trials"):
        what = f"would end a path at its beginning, near the baseline (got {show(view.get('budget.stall_trials'))})"
        yield ("budget", "stall_trials"), f"{what}; leave it out"
    if domain.kind == "choice" and view.get("search.trials") not in (None, section["trials"]):
        yield ("search", "trials"), "means nothing where deft.alpha is a choice: a path has each of its values once"


def _grid(view: View) -> Iterator[Fault]:
    """A grid is of single values, and no larger than somebody would want to list."""
    if view.get("search.sampler") != "grid":
        return
    if view.get("search.try_first"):
        yield ("search", "try_first"), "means nothing to the grid sampler, which tries every point; leave it out"
    if view.get("search.trials") not in (None, SearchSection.model_fields["trials"].default):
        yield ("search", "trials"), "means nothing to the grid sampler, which tries every point; leave it out"
    ranges = {dotted: domain for dotted, domain in view.space.items() if domain.kind in ("uniform", "loguniform")}
    for dotted, domain in ranges.items():
        yield tuple(dotted.split(".")), f"the grid sampler takes single values (got {domain}); allowed: choice, randint"
    others = (domain for dotted, domain in view.space.items() if dotted not in ranges)
    size = math.prod(
        len(domain.args) if domain.kind == "choice" else 1 + int(domain.args[1]) - int(domain.args[0])
        for domain in others
    )
    if size > _LARGEST_GRID:
        yield (
            ("search", "sampler"),
            f"a grid has at most {_LARGEST_GRID:,} points (got {size:,}); take 'random' or 'mo_tpe'",
        )


def _rungs(view: View) -> Iterator[Fault]:
    """Rungs are for a scheduler, and lie before a trial's last step."""
    scheduler = view.get("search.scheduler", "none")
    if scheduler == "none":
        for leaf in ("first_rung", "reduction_factor"):
            value, default = view.get(f"search.{leaf}"), SearchSection.model_fields[leaf].default
            if value not in (None, default):
                yield ("search", leaf), f"is read by no trial (got {show(value)}); needs scheduler mo_asha or asha"
        return
    first = view.get("search.first_rung", 1 / 9)
    for path, steps in all_values(view, "train.steps", None):
        if is_count(steps) and is_number(first) and (steps < 2 or round(first * steps) >= steps):
            what = f"a trial of {steps} steps ends before the first rung, {first:g} of them (got {show(steps)})"
            yield path, f"{what}; give more steps, a smaller search.first_rung, or scheduler none"
            return
        factor = view.get("search.reduction_factor", SearchSection.model_fields["reduction_factor"].default)
        if not (is_count(steps) and is_number(first) and is_number(factor) and first > 0 and factor >= 1.5):
            continue  # refused already
        places = rung_places(shares_of(first, factor), steps)
        if len(set(places)) < len(places):
            what = (
                f"a trial of {steps} steps has two rungs at one step: {', '.join(map(str, places))} (got {show(steps)})"
            )
            yield path, f"{what}; give more steps, a larger search.first_rung, or scheduler none"
            return


def _dial(view: View) -> Iterator[Fault]:
    taus = view.get("dial.taus", [])
    for index, tau in enumerate(taus if isinstance(taus, list) else []):
        if is_number(tau) and tau_key(tau) in map(tau_key, filter(is_number, taus[:index])):
            yield ("dial", "taus", index), f"threshold stands twice (got {show(tau)})"
    count, rows = view.get("dial.calibration_examples", 256), view.get("data.train_examples")
    if taus and is_count(count) and is_count(rows) and count >= rows:
        path = ("dial", "calibration_examples")
        yield path, f"must be below data.train_examples = {rows}, from which they are held out (got {count})"


def _objectives(view: View) -> Iterator[Fault]:
    """One score to maximise, one density to minimise; a thresholded density at a τ of the dial."""
    given = view.get("search.objectives", {})
    taus = view.get("dial.taus", [])
    if not isinstance(given, dict) or not isinstance(taus, list) or view.is_broken("dial.taus") or not given:
        return
    known = {"score": "max", "density": "min", **{f"density@{tau_key(tau)}": "min" for tau in taus}}
    for name, direction in given.items():
        path = ("search", "objectives", name)
        if name not in known:
            hint = "" if taus else "; density@τ needs dial.taus"
            yield path, f"unknown objective; {did_you_mean(str(name), known)}allowed: {', '.join(known)}{hint}"
        elif direction != known[name]:
            yield path, f"can only be '{known[name]}' (got {show(direction)})"
    if all(name in known for name in given) and sorted(known[name] for name in given) != ["max", "min"]:
        what = "must be the score and one density"
        yield ("search", "objectives"), f"{what} (got {', '.join(given)}); one of {', '.join(known)}"


SEARCH_RULES = (_baseline, _seeds, _try_first, _warm_start, _scope, _path, _grid, _rungs, _dial, _objectives)
