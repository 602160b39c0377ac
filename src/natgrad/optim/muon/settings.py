"""NewtonMuon's settings: what they may be, and the learning rate of all that is not a hidden matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natgrad.checks.values import check_flag, check_number, check_within, did_you_mean

SIDES = {
    "none": "orthogonalized alone, as Muon",
    "input": "whitened by the second moment of the inputs",
    "both": "and by that of the gradients on the output side",
}
REST = 0.5
"""The learning rate of AdamW's steps, in units of that of the matrices."""


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting is out of range, or misspelt."""
    for name in ("lr", "rest", "weight_decay", "eps"):
        check_number(name, group[name])
    check_number("rest_weight_decay", group["rest_weight_decay"], optional=True)
    check_within("momentum", group["momentum"], "[0, 1)")
    for name in ("cautious", "nesterov"):
        check_flag(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is not usable: expected two numbers in [0, 1)")
    for beta in betas:
        check_within("betas", beta, "[0, 1)")
    for key in group.keys() - {"params", *defaults}:
        near = did_you_mean(key, defaults)
        if near and key != "initial_lr":  # other keys are the user's own, as in torch
            raise ValueError(f"a group has {key!r}; expected settings among {', '.join(defaults)}{near}")


def share_of_lr(rest_lr: Any, lr: Any) -> float:
    """The rate of AdamW's steps in units of the matrices' `lr`, so that schedulers change both."""
    check_number("rest_lr", rest_lr)
    check_number("lr", lr)
    if lr == 0 and rest_lr != 0:
        raise ValueError(
            f"rest_lr={rest_lr!r} is not usable beside lr=0, of which it is kept as a share; expected lr > 0"
        )
    return float(rest_lr / lr) if rest_lr else 0.0
