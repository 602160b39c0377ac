"""Resuming from a checkpoint of `torch.distributed.checkpoint`, on as many ranks as there are now."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from natgrad.checks.values import described
from natgrad.optim.newton_muon import NewtonMuon
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.saved import by_index

Path = tuple[Any, ...]
BY_LAYER = ("moments", "squares", "bases", "inverse")
"""Parts of the state that may be on the rank of their layer only."""


def load_checkpoint(opt: CurvatureOptimizer | NewtonMuon, path: str | PathLike[str], key: str = "optimizer") -> None:
    """Resumes from `torch.distributed.checkpoint.save({key: opt.state_dict(), ...}, checkpoint_id=path)`. The
    checkpoint may be from another number of ranks, with sharded or whole parameters.

    Call it on all ranks. Load the model's parameters as usual.

    Args:
        opt: an optimizer with the same settings as the saved one, made for the model to be trained further.
        path: the folder of the checkpoint.
        key: the key of the optimizer's state in the checkpoint.

    Raises:
        TypeError: if `opt` is another library's optimizer.
        FileNotFoundError: if there is no checkpoint in the folder.
        ValueError: if the checkpoint has no such key, or belongs to another optimizer or model.

    Example:
        >>> import tempfile, torch, natgrad, torch.distributed.checkpoint as dcp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> opt = natgrad.KFAC(model, torch.nn.CrossEntropyLoss())
        >>> folder = tempfile.mkdtemp()
        >>> _ = dcp.save({"optimizer": opt.state_dict()}, checkpoint_id=folder, no_dist=True)
        >>> natgrad.load_checkpoint(natgrad.KFAC(model, torch.nn.CrossEntropyLoss()), folder)
    """
    # Importing these takes longer than importing all of this library.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_values

    if not isinstance(opt, (CurvatureOptimizer, NewtonMuon)):
        raise TypeError(
            f"opt is {described(opt)}; expected a KFAC, NaturalGradient or NewtonMuon optimizer; others load as in "
            "torch"
        )
    reader = FileSystemReader(path)
    try:
        metadata = reader.read_metadata()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} has no checkpoint (no file .metadata); expected a folder that torch.distributed.checkpoint.save "
            "has written to, on all ranks the same"
        ) from None
    paths: dict[str, Path] = {fqn: p[1:] for fqn, p in metadata.planner_data.items() if p[0] == key}
    if not paths:
        has = ", ".join(repr(k) for k in dict.fromkeys(str(p[0]) for p in metadata.planner_data.values()))
        raise ValueError(f"{path} has no {key!r}; it has {has}. Pass the key of the optimizer's state as key=")

    found: dict[Path, Any] = {}

    def load(wanted: Mapping[str, Path]) -> None:
        values = {fqn: _room(opt, metadata.state_dict_metadata[fqn], p) for fqn, p in wanted.items()}
        group = opt.parameters.place.world.group
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        load_values(values, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
        found.update({p: values[fqn] for fqn, p in wanted.items()})

    sizes: dict[str, list[torch.Size]] = {}
    for fqn, p in paths.items():
        what = metadata.state_dict_metadata[fqn]
        if "moments" in p:
            sizes.setdefault(p[-2], []).extend([what.size] if isinstance(what, TensorStorageMetadata) else [])
    here, changed = opt.adopt(sizes) if isinstance(opt, NewtonMuon) else opt.recipe.preconditioner.adopt(sizes)
    load({fqn: p for fqn, p in paths.items() if (layer := _layer_of(p)) is None or here(layer)})
    state = _nested(found)
    # A checkpoint leaves empty dictionaries out.
    empty: dict[str, Any] = {k: {} for k, v in opt.state_dict()[opt._key].items() if isinstance(v, dict)}
    opt.load_state_dict(state | {opt._key: empty | state.get(opt._key, {}) | changed})


def _layer_of(path: Path) -> str | None:
    """The key of the layer that an entry belongs to."""
    return next((str(path[i + 1]) for i, k in enumerate(path[:-1]) if k in BY_LAYER), None)


def _room(opt: CurvatureOptimizer | NewtonMuon, what: Any, path: Path) -> Any:
    """An empty tensor to read a tensor into; None for anything else."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not isinstance(what, TensorStorageMetadata):
        return None
    if path[0] == "state":
        p = by_index(opt)[int(path[1])]
        local = opt.parameters.place.local(p)
        if what.size == p.shape:
            return opt.parameters.place.stored(p, torch.empty_like(local, dtype=what.properties.dtype))
    return torch.empty(what.size, dtype=what.properties.dtype, device=opt.parameters.device)


def _nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dictionaries and lists, from the paths to their leaves."""
    tree: dict[Any, Any] = {}
    for path, value in values.items():
        at = tree
        for k in path[:-1]:
            at = at.setdefault(k, {})
        at[path[-1]] = value
    tree["state"] = {int(k): v for k, v in tree.get("state", {}).items()}
    return {k: v if k == "state" else _listed(v) for k, v in tree.items()}


def _listed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {k: _listed(v) for k, v in tree.items()}
    return [values[i] for i in range(len(values))] if values and all(isinstance(k, int) for k in values) else values
