"""Every public callable, every argument, everything that may be wrong with it: an error that names the argument.

Calls and arguments come from the signatures, so that a new argument is tried by itself. One whose name is not in KINDS
fails: say there what it takes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import bad_ranking
import bad_values as bad
import pytest
import torch
from bad_values import D, Kind, N

import contrastive_kernels as ck
from contrastive_kernels.arguments import hints
from contrastive_kernels.panels import size

X, Y, VECTOR, INDEX = torch.eye(N, D), torch.eye(N, D) + 0.5, torch.zeros(N), torch.arange(N)
SAMPLES = 10

#: What an argument of this name takes; "callable.argument" where it differs.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("x", "y", "image_features", "text_features", "z1", "z2"), bad.features),
    **dict.fromkeys(("image", "text", "image_aug", "text_aug"), bad.features),
    **dict.fromkeys(("image_independent", "text_independent"), bad.features),
    **dict.fromkeys(("image_independent_aug", "text_independent_aug"), bad.features),
    **dict.fromkeys(("logit_scale", "logit_bias", "independent_logit_scale"), bad.scale),
    "log_normalizer": bad.normalizer,
    **dict.fromkeys(("positive_logits", "candidate_bias"), bad.vector),
    "weight": bad.weight,
    "positives": bad.positives,
    **dict.fromkeys(("exclude", "ids"), bad.ids),
    **dict.fromkeys(("labels", "y_labels"), bad.labels),
    "label_smoothing": bad.part,
    "variant": bad.word,
    "index": bad.samples,
    "generator": bad.generator,
    **dict.fromkeys(("reduction", "backend", "loss", "name", "first_visit", "gradients", "strategy"), bad.word),
    **dict.fromkeys(("normalize", "return_log_normalizer", "return_terms", "output_dict", "uneven"), bad.flag),
    "group": bad.group,
    **dict.fromkeys(("include_positive", "read_only", "across", "return_metrics"), bad.flag),
    **dict.fromkeys(("workspace_bytes", "d", "features", "side", "num_samples"), bad.positive_count),
    **dict.fromkeys(("in_features", "out_features", "hidden_features"), bad.positive_count),
    **dict.fromkeys(("n", "m", "columns"), bad.count),
    "shape": bad.positive_number,
    **dict.fromkeys(("positive_constant", "negative_scale", "safeguard"), bad.amount),
    **dict.fromkeys(("cross", "intra", "augmented", "orthogonality", "contrast", "uniformity"), bad.amount),
    **dict.fromkeys(("separation", "bridge", "geometry"), bad.amount),
    "t": bad.mixture,
    "k": bad.cutoffs,
    **dict.fromkeys(("hardest_negatives.k", "size"), bad.positive_count),
    "skip": bad.count,
    "margin": bad.margin,
    "relevance": bad.relevance,
    "positive_features": bad.features,
    "queue": bad.queue,
    "debiased": bad.correction,
    "hardness_beta": bad.amount,
    "sigma": bad.positive_number,
    **dict.fromkeys(("weight_fn", "matryoshka.loss", "MatryoshkaLoss.loss"), bad.function),
    "dims": bad.lengths,
    "members": lambda: {"one name": "ids", "a name of none": ("colour",), "a number": 3, "numbers": [1]},
    **dict.fromkeys(("matryoshka.weights", "MatryoshkaLoss.weights"), bad.factors),
    **dict.fromkeys(("exclude_self", "FeatureQueue.ids"), bad.flag),
    "enqueue.features": bad.features,
    "state": bad.sequence,
    "dtype": bad.dtype,
    "device": bad.device_that_is_here,
    "plan.device": bad.device,
    "forward.features": bad.rows,
    "autotune.device": bad.device,
    "capability": bad.capability,
    "step": bad.positive_part,
    "floor": bad.part,
    "directions": bad.directions,
    "world": bad.positive_count,
    "links": bad.positive_number,
    **dict.fromkeys(
        ("multiple_negatives_ranking.directions", "MultipleNegativesRankingLoss.directions"), bad_ranking.ways
    ),
    "gamma": bad.positive_part,
    "gamma_schedule": bad.word,
    "gamma_decay_epochs": bad.positive_count,
    "epoch": bad.count,
    "rho": bad.amount,
    **dict.fromkeys(("temperature", "independent_temperature"), bad_ranking.temperature),
    "ISogCLRLoss.temperature": bad.positive_number,
    "temperature_bounds": bad_ranking.bounds,
    "temperature_rate": bad.amount,
    "temperature_momentum": bad.part,
    "temperature_betas": bad_ranking.betas,
    "temperature_clip": bad.positive_number,
    "towers": lambda: bad.positive_count() | {"three": 3},
    "direction": bad.direction,
    **dict.fromkeys(("storage", "folder"), bad.folder),
    "negatives": bad.notional,
    **dict.fromkeys(("anchor", "positive"), bad.features),
    **dict.fromkeys(
        ("multiple_negatives_ranking.negatives", "MultipleNegativesRankingLoss.forward.negatives"),
        bad_ranking.hard_negatives,
    ),
    **dict.fromkeys(("partition", "hardness_mode"), bad.word),
    "hardness_strength": bad.amount,
    "guided": bad_ranking.guide,
    **dict.fromkeys(
        ("multiple_negatives_ranking.guided", "MultipleNegativesRankingLoss.forward.guided"), bad_ranking.guided
    ),
    "guided_margin": bad.margin,
    **dict.fromkeys(("weights", "max_ratio"), bad.choice),
    **dict.fromkeys(("separation_options", "bridge_options", "geometry_options"), bad.options),
    "base": bad.base,
    **dict.fromkeys(("found", "lower_bound", "stored"), bad.table),
    "visits": bad.counts,
    "ratio": bad.ratio,
    "expectation": bad.expectation,
    "encode": bad.encoder,
    **dict.fromkeys(("batches", "accumulate.index"), bad.sequence),
    "encoders": bad.encoders,
    "inputs": bad.inputs,
    **dict.fromkeys(("cached_step.loss", "cached_loss.loss"), bad.loss),
    "chunk_size": bad.positive_count,
    **dict.fromkeys(("scaler", "no_sync"), bad.context),
}

#: Arguments that hold another callable's keywords.
OPTIONS_OF = {
    "separation_options": "feature_separation",
    "bridge_options": "brownian_bridge",
    "geometry_options": "geometric_consistency",
}

#: What a kind holds and a callable's argument takes after all.
FINE = {
    # where y is left out, x may have any dtype, and no values are asked for
    *(
        (name, "x", what)
        for name in ("explain", "why_not")
        for what in ("on meta", "of other features", "of another dtype")
    ),
    ("DatasetContrastiveLoss.e_step", "index", "too long"),
    ("FeatureQueue.enqueue", "features", "of another dtype"),
    ("NormalizerMemory.read", "index", "too long"),
    # the world may be there once the module is called
    *((name, "group", "a world that is not there") for name in ck.__all__ if name[0].isupper()),
    ("NormalizerMemory.open", "group", "a world that is not there"),
}

#: Arguments of a call that is right, by name; "callable.argument" where it differs.
VALUES: dict[str, Any] = {
    **dict.fromkeys(("x", "image_features", "image", "image_aug", "z1"), X),
    **dict.fromkeys(("y", "text_features", "text", "text_aug", "z2"), Y),
    **dict.fromkeys(("image_independent", "image_independent_aug"), X),
    **dict.fromkeys(("text_independent", "text_independent_aug"), Y),
    **dict.fromkeys(("anchor", "positive"), X),
    "logit_scale": 5.0,
    "logit_bias": -1.0,
    "log_normalizer": VECTOR,
    "index": INDEX,
    "labels": INDEX // 2,
    "num_samples": SAMPLES,
    "n": 8,
    "name": "torch",
    "in_features": 3,
    "out_features": 2,
    "found": torch.zeros(N, 1),
    "stored": torch.zeros(N, 1, dtype=torch.float64),
    "visits": torch.ones(N, 1, dtype=torch.int32),
    "average.found": torch.zeros(N, 1, dtype=torch.float64),
    "ratio": 1.5,
    "folder": "nowhere",
    "grow.num_samples": SAMPLES,
    "features": 64,
    "forward.features": X,
    "size": 8,
    "dims": (1, 2),
    "matryoshka.loss": ck.clip_loss,
    "MatryoshkaLoss.loss": ck.ClipLoss(),
    "enqueue.features": X,
    "state": {"next": 0, "count": 0},
    "encode": lambda batch: (X, Y),
    "batches": [0, 1],
    "accumulate.index": [INDEX, INDEX + N],
    "encoders": torch.nn.Linear(D, 2),
    "inputs": (X, Y),
    **dict.fromkeys(("cached_step.loss", "cached_loss.loss"), lambda x, y: ck.clip_loss(x, y, 5.0)),
    "chunk_size": 2,
    "epoch": 3,
    "SogCLRLoss.set_extra_state.state": {"epoch": 1},
    "ISogCLRLoss.set_extra_state.state": {"epoch": 1},
}

#: Arguments that a callable needs beside its required ones, for the others to play a part.
BESIDE: dict[str, dict[str, Any]] = {
    **{
        name: {"y": Y, "y_labels": INDEX}
        for name in ("sup_con", "SupConLoss.forward", "multi_positive_nce", "MultiPositiveNCELoss.forward")
    },
    "plan": {"device": "cuda", "capability": 90},
    **{
        name: {"negatives": torch.ones(N, 2, D), "guided": (X, Y, torch.ones(N, 2, D))}
        for name in ("multiple_negatives_ranking", "MultipleNegativesRankingLoss.forward")
    },
    "brownian_bridge": {"image_aug": X},
    "sigmoid": {"logit_bias": VALUES["logit_bias"]},
    **{name: {"log_normalizer": VECTOR} for name in ("decomposable", "DecomposableLoss.forward")},
    **{name: {"gamma_schedule": "cosine", "gamma_decay_epochs": 3} for name in ("SogCLRLoss", "ISogCLRLoss")},
    "FeatureQueue.enqueue": {"ids": INDEX},
    "retrieval_metrics": {"positives": INDEX.flip(0)},
    "LatentStructureLoss": {"separation": 1.0, "bridge": 1.0, "geometry": 1.0},
    "LatentStructureLoss.forward": {
        name: VALUES[name] for name in ("image_aug", "text_aug", "image_independent", "text_independent")
    },
}

#: Results, which users do not make, and another name of one that is tried.
NOT_TRIED = {"LossMetrics", "NormalizerStatistics", "RetrievalMetrics", "DecomposableContrastiveLoss"}

#: Of these no call is right here.
NO_RIGHT_CALL = {
    "autotune": "it wants a GPU",
    "NormalizerMemory.open": "it wants a folder",
    "MatryoshkaLoss.forward": "it wants the arguments of its loss",
}

#: How an object is made whose methods are tried.
MAKE: dict[str, Callable[[], Any]] = {
    "DatasetContrastiveLoss": lambda: ck.DatasetContrastiveLoss(SAMPLES, directions=1),
    "FeatureQueue": lambda: ck.FeatureQueue(8, D, ids=True),
    "SogCLRLoss": lambda: ck.SogCLRLoss(SAMPLES),
    "ISogCLRLoss": lambda: ck.ISogCLRLoss(SAMPLES),
    "LatentStructureLoss": lambda: ck.LatentStructureLoss(None, 1.0, 1.0, 1.0),
    "NormalizerMemory": lambda: ck.NormalizerMemory(SAMPLES, 1),
    "SeparationHead": lambda: ck.SeparationHead(D, 2),
}


def callables() -> Iterator[tuple[str, Any]]:
    """Names of all that users call, methods as Class.method, and where their signature is."""
    for name in ck.__all__:
        value = getattr(ck, name)
        if not callable(value) or name in NOT_TRIED:
            continue
        yield name, value
        if isinstance(value, type):
            for method, function in inspect.getmembers(value, callable):
                own = str(getattr(function, "__module__", "")).startswith("contrastive_kernels")
                if own and not method.startswith("_") and method != "extra_repr":
                    yield f"{name}.{method}", function


def arguments(function: Any) -> dict[str, inspect.Parameter]:
    """Those that have names; the modules' ``**options`` are their base's."""
    parameters = inspect.signature(function).parameters
    if isinstance(function, type) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = {**inspect.signature(function.__mro__[1]).parameters, **parameters}
    return {n: p for n, p in parameters.items() if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


CALLABLES = dict(callables())
ARGUMENTS = [(name, argument) for name, function in CALLABLES.items() for argument in arguments(function)]


def look_up(table: dict[str, Any], name: str, argument: str) -> Any:
    """What a table says of an argument, of this callable or of all."""
    for key in (f"{name}.{argument}", f"{name.rpartition('.')[2]}.{argument}", argument):
        if key in table:
            return table[key]
    raise LookupError(
        f"{argument} of {name} is new: say in test_bad_inputs.py what it takes, and a value that is right"
    )


def prepared(name: str, tried: str = "") -> tuple[Callable[..., Any], dict[str, Any]]:
    """A callable, its object made anew, and the arguments of a call that is right but for the one that is tried."""
    function, (owner, _, method) = CALLABLES[name], name.partition(".")
    given = dict(BESIDE.get(name, {}))
    if {"logit_scale", "temperature"} <= set(arguments(function)):
        given["logit_scale"] = None if tried == "temperature" else VALUES["logit_scale"]
    for argument, parameter in arguments(function).items():
        if parameter.default is parameter.empty and argument != "expectation":
            given.setdefault(argument, look_up(VALUES, name, argument))
    if method:
        made = MAKE.get(owner, getattr(ck, owner))()
        function = getattr(made, method)
        if "expectation" in arguments(CALLABLES[name]):
            given["expectation"] = made.e_step(INDEX)
    return function, given


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    """Hints look at the first call's arguments, whatever these are."""
    monkeypatch.setattr(hints, "unseen", {"lengths", "scale"})


@pytest.mark.parametrize("name", sorted(set(CALLABLES) - set(NO_RIGHT_CALL)))
def test_the_call_without_bad_values_is_right(name):
    function, given = prepared(name)
    function(**given)


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_bad_values_are_refused(name, argument):
    kind: Kind = look_up(KINDS, name, argument)
    values, parameter = kind(), arguments(CALLABLES[name])[argument]
    values |= bad_options(argument)
    if parameter.default is not None and "None" not in str(parameter.annotation):
        values["nothing"] = None
    complaints = []
    for what, value in values.items():
        function, given = prepared(name, argument)
        complaint = complaint_about(argument, function, {**given, argument: value})
        if ((name, argument, what) in FINE) == (complaint is None):
            complaints.append(f"{argument} {what}: {complaint or 'an error, but FINE says that it is taken'}")
    assert not complaints, "\n".join([name, *complaints])


def bad_options(argument: str) -> dict[str, Any]:
    """What may be wrong with the keywords that an argument holds, one at a time."""
    owner, bad_ones = OPTIONS_OF.get(argument), {}
    for option, parameter in {} if owner is None else arguments(CALLABLES[owner]).items():
        if parameter.kind is parameter.KEYWORD_ONLY and option != "return_terms":
            values = look_up(KINDS, owner, option)()
            bad_ones |= {f"with {option} {what}": {option: value} for what, value in values.items()}
    return bad_ones


def complaint_about(argument: str, function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """What is wrong with the way in which a call with a bad value ends."""
    try:
        function(**given)
    except (TypeError, ValueError) as error:
        if argument in re.findall(r"\w+", str(error).partition(":")[0]):
            return None
        return f"{type(error).__name__} that does not begin with its name: {str(error)[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return "taken without a word"


@pytest.mark.parametrize("name", [n for n, argument in ARGUMENTS if argument == "workspace_bytes"])
def test_no_workspace_is_that_of_the_device(name, monkeypatch):
    """None is the default and is taken; one rule gives all calls their bytes."""
    assert arguments(CALLABLES[name])["workspace_bytes"].default is None
    function, given = prepared(name)
    function(**{**given, "workspace_bytes": None})
    monkeypatch.setattr(size, "WORKSPACE", 11)
    monkeypatch.setattr(size, "GPU_WORKSPACE", 11)
    if not isinstance(function, type):
        with pytest.raises(ValueError, match=r"workspace_bytes: expected at least .*; got 11"):
            function(**given)


def test_an_unknown_argument_is_found_out():
    with pytest.raises(LookupError, match="of info_nce is new"):
        look_up(KINDS, "info_nce", "bandwidth")


def test_a_base_that_returns_rows_is_refused():
    loss = ck.LatentStructureLoss(lambda image, text, logit_scale: image)
    with pytest.raises(TypeError, match="base: expected a module that returns a scalar"):
        loss(X, Y, 1.0)
