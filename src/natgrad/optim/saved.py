"""What an optimizer has saved of its own, beside what torch's optimizers save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natgrad.checks.values import described


def state_of(state_dict: Any, key: str, optimizer: str) -> dict[str, Any]:
    """What an optimizer saved of its own under `key`, beside torch's.

    Raises:
        TypeError: if it is no dictionary.
        ValueError: if it is not such an optimizer's.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is {described(state_dict)}; expected what state_dict() gave, as by torch.load(path)"
        )
    if not isinstance(state_dict.get(key), Mapping):
        has = ", ".join(map(repr, list(state_dict)[:6])) or "nothing"
        raise ValueError(f"the state has {has} and no {key!r}: it is not a {optimizer} optimizer's; load that one's")
    return dict(state_dict[key])
