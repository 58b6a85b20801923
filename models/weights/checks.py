"""Checks that weights fit a model: their keys, shapes and types, and that they are finite."""

from collections.abc import Collection
from itertools import islice

import torch
from torch import Tensor

from models.errors import InputError

MAX_KEYS_LISTED = 3  # in an error message
MAX_KEY_LENGTH = 90  # characters of a key in an error message


def check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists the keys that are missing, unknown, or of another shape or
    type than `expected`. A missing `num_batches_tracked` is added to `weights` as zero; a tensor
    `[1]`, as which some programs save `logit_scale`, becomes a number."""
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):  # has no effect; some files leave it out
            weights[key] = torch.zeros((), dtype=torch.long)
    common = [key for key in expected if key in weights]
    weights.update(
        {k: weights[k][0] for k in common if expected[k].ndim == 0 and weights[k].shape == (1,)}
    )
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "wrongly shaped": [
            f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
            for key in common
            if weights[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {weights[key].dtype} instead of {expected[key].dtype}"
            for key in common
            if expected[key].is_floating_point() and not weights[key].is_floating_point()
        ],
    }
    found = [f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights do not fit a CLIP model; {'; '.join(found)}; download or save them anew"
        )


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists the tensors with NaN or infinity."""
    not_finite = [
        key
        for key, tensor in weights.items()
        # The sum comes first, because it needs no memory. If it is finite, all numbers are; if not,
        # it may be that finite numbers were too large to add up.
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()
    ]
    if not_finite:
        raise InputError(
            "NaN or infinity in the weights, so that every result would be NaN: "
            f"{listed(not_finite)}; take weights from before the training went wrong"
        )


def listed(names: Collection[str]) -> str:
    """The first few names in one line, and the number of the others."""
    some = [name if name.isprintable() else repr(name) for name in islice(names, MAX_KEYS_LISTED)]
    text = ", ".join(
        name if len(name) <= MAX_KEY_LENGTH else f"{name[:MAX_KEY_LENGTH]}..." for name in some
    )
    more = len(names) - len(some)
    return f"{text} and {more:,} more" if more else text or "none"
