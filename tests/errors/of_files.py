"""What users get wrong about files."""

import json
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import save_file
from torch import nn

import natgrad
from natgrad.linalg.files import sealed
from of_data_and_losses import net
from of_vectors import matrix

FOLDER = Path(mkdtemp())


def written(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def cut_short() -> None:
    whole = FOLDER / "whole.safetensors"
    matrix().save(whole)
    natgrad.load(written("half.safetensors", whole.read_bytes()[:1000]))


def described_by(structure: str) -> None:
    natgrad.load(written("described.safetensors", b"".join(sealed({"0": torch.ones(2)}, structure))))


def with_metadata(**metadata: str) -> None:
    path = FOLDER / "foreign.safetensors"
    save_file({"0": torch.ones(2)}, path, metadata=metadata)
    natgrad.load(path)


def one_bit_changed() -> None:
    whole = FOLDER / "whole.safetensors"
    matrix().save(whole)
    content = bytearray(whole.read_bytes())
    content[-1] ^= 1
    natgrad.load(written("changed.safetensors", bytes(content)))


def a_models_own() -> None:
    path = FOLDER / "model.pt"
    torch.save(net().state_dict(), path)
    natgrad.load(path)


def of_another_model() -> None:
    path = FOLDER / "of.safetensors"
    matrix().save(path)
    natgrad.load(path, model=nn.Linear(4, 3))


# fmt: off
ROWS = [
    ("a folder that does not exist", lambda: matrix().save(FOLDER / "none" / "f.safetensors"), FileNotFoundError,
     "f.safetensors cannot be written, as there is no folder ", "; make it first"),
    ("a folder to save to", lambda: matrix().save(FOLDER), IsADirectoryError,
     " is a folder; expected the name of a file: ", "matrix.safetensors"),
    ("a file that does not exist", lambda: natgrad.load(FOLDER / "none.safetensors"), FileNotFoundError,
     "none.safetensors is not a file; expected a safetensors file that save() wrote"),
    ("a folder to load", lambda: natgrad.load(FOLDER), IsADirectoryError,
     " is not a file; expected a safetensors file"),
    ("a file of torch.save", a_models_own, ValueError,
     "model.pt is not a safetensors file (", "expected one that save()"),
    ("an empty file", lambda: natgrad.load(written("empty", b"")), ValueError, "empty is not a safetensors file ("),
    ("half a file", cut_short, ValueError, "half.safetensors is not a safetensors file (", "expected one that save()"),
    ("a file of a later version", lambda: with_metadata(natgrad="{}", format="2"), ValueError,
     "has format '2', but this version of natgrad reads '1'; load it with the version that saved it, or compute"),
    ("a file without a checksum", lambda: with_metadata(natgrad="{}", format="1"), ValueError,
     "foreign.safetensors has no checksum; expected a file that save() wrote; save the matrix again"),
    ("a changed file", one_bit_changed, ValueError,
     "changed.safetensors is damaged: its checksum does not match its content; save the matrix again"),
    ("a file of something else", lambda: described_by("[1]"), ValueError,
     "described.safetensors holds a list of 1, not a matrix; expected a file written by a matrix's save()"),
    ("a damaged file", lambda: described_by("{]"), ValueError,
     "is damaged: the description of its tensors cannot be read; save the matrix again"),
    ("a matrix of another kind", lambda: described_by(json.dumps({"dict": [["kind", "Toeplitz"]]})), ValueError,
     "the saved operator is of kind 'Toeplitz', which is unknown to this version of natgrad; ", "load it with the"),
    ("the matrix of another model", of_another_model, ValueError,
     "is for another model: its '0.weight' of shape (5, 4) is not a parameter of this one; pass the model that"),
    ("an implicit matrix to be saved", lambda: matrix("implicit").save(FOLDER / "f"), TypeError,
     "ImplicitGaussNewton holds a model and data, not a matrix, and cannot be saved; use structure='kfac', "),
]
