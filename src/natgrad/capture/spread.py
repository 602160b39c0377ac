"""Outputs that all examples share, such as those of positions, and the calls that copy them for each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from natgrad.capture.layers import ADDITIONS, RESHAPES, Kind, Scale
from natgrad.capture.layers.affine import Affine
from natgrad.capture.layers.embedding import Embedding
from natgrad.capture.layers.scale import REPEATS, repeats_of
from natgrad.capture.use import Use


@dataclass(frozen=True)
class Seen:
    """The output of a use, in the shape in which a call received it, and the `kind` for this shape."""

    tensor: Tensor
    use: Use
    kind: Kind


@dataclass(frozen=True)
class Copied:
    """A use whose output was copied by a call, with the number of copies. `other` is the tensor that was added."""

    use: Use
    kind: Kind
    h: Tensor
    other: Tensor | None


class Spreading:
    """Follows the outputs of linear maps, embeddings, scales and shifts through new axes of length one."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Seen]] = {}

    def note(self, use: Use) -> None:
        if isinstance(use.kind, (Affine, Embedding)) or (isinstance(use.kind, Scale) and use.kind.is_elementwise):
            self._seen.setdefault(id(use.a), []).append(Seen(use.a, use, use.kind))

    def forget(self, use: Use) -> None:
        """Stops following a use."""
        for key in [key for key, its in self._seen.items() if any(seen.use is use for seen in its)]:
            self._seen[key] = [seen for seen in self._seen[key] if seen.use is not use]

    def look_at(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Copied]:
        """The uses of which a call returns copies, if any."""
        operands = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        known = [t for t in operands if id(t) in self._seen]
        if not known or not isinstance(out, Tensor):
            return []
        if func in RESHAPES or func is Tensor.__getitem__:
            self._reshaped(known[0], out)
            return []
        adds = func in ADDITIONS
        if adds and (len(operands) != 2 or kwargs.get("alpha", 1) != 1):
            return []
        times = repeats_of(args[1:], kwargs) if func in REPEATS else None
        found = []
        for t in known if adds else known[:1]:
            other = next(o for o in operands if o is not t) if adds and operands[0] is not operands[1] else None
            if out.numel() > t.numel():
                found += [_copied(seen, out, other, times) for seen in self._seen[id(t)]]
        return [copied for copied in found if copied is not None]

    def _reshaped(self, known: Tensor, out: Tensor) -> None:
        found = [
            Seen(out, seen.use, kind) for seen in self._seen[id(known)] if (kind := _kind_in(seen, out)) is not None
        ]
        if found:
            self._seen[id(out)] = found


def _kind_in(seen: Seen, out: Tensor) -> Kind | None:
    """The kind of a use whose output gained or lost axes of length one; None if more was changed."""
    shape, new = tuple(seen.tensor.shape), tuple(out.shape)
    if [s for s in shape if s != 1] != [s for s in new if s != 1] or shape[-1:] != new[-1:]:
        return None
    if not isinstance(seen.kind, Scale):
        return seen.kind
    spread = (1,) * (len(shape) - len(seen.kind.spread)) + seen.kind.spread
    own = iter([p for p, s in zip(spread, shape, strict=True) if s != 1])
    return replace(seen.kind, spread=tuple(1 if s == 1 else next(own) for s in new))


def _copied(seen: Seen, out: Tensor, other: Tensor | None, times: tuple[int, ...] | None) -> Copied | None:
    t, h, a = seen.tensor, seen.use.h, seen.use.a
    if isinstance(seen.kind, Scale):
        grid = out.ndim
        if t.ndim < len(seen.kind.spread) or (h.numel() > 1 and h.shape != a.shape):
            return None
        h = h.reshape(t.shape) if h.numel() > 1 else h.reshape([1] * t.ndim)
    else:
        grid = out.ndim - 1
        if out.shape[-1] != t.shape[-1]:
            return None
        h = h.reshape(*t.shape[:-1], *h.shape[a.ndim - 1 :])
    if times is not None:
        own = (1,) * (out.ndim - t.ndim) + tuple(t.shape)
        if any(n != 1 and size != 1 for n, size in zip(times, own, strict=True)):
            return None
    features = h.shape[t.ndim :] if isinstance(seen.kind, Scale) else h.shape[t.ndim - 1 :]
    return Copied(seen.use, seen.kind, h.expand(*out.shape[:grid], *features), other)
