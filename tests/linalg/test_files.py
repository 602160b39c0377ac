"""Files of matrices: written whole or not at all, and refused by name unless they are whole and unharmed."""

import errno
import json
import os
import pickle
import random
import stat
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import natgrad
from natgrad.checks import files
from natgrad.checks.files import write_whole
from natgrad.linalg import CenteredKronecker, Dense, Diagonal, Kronecker
from natgrad.linalg.files import load, sealed
from oracles import f64, randn, spd

MATRICES = {
    "Kronecker": lambda: Kronecker(spd(4, 0), spd(3, 1)),
    "an inverse": lambda: CenteredKronecker(covariance=spd(4, 0), mean=randn(4), output=spd(3, 1)).inverse(0.1),
    "a sum": lambda: Dense(spd(3, 0)) + 2 * Diagonal((randn(3) ** 2,)),
    "kfac": lambda: of_a_model("kfac"),
    "ekfac": lambda: of_a_model("ekfac"),
    "block": lambda: of_a_model("block"),
    "diagonal": lambda: of_a_model("diagonal"),
    "dense": lambda: of_a_model("dense"),
    "the inverse of kfac": lambda: of_a_model("kfac").inverse(0.1),
    "the power of ekfac": lambda: of_a_model("ekfac").power(-0.5, 0.1),
}


def of_a_model(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2, bias=False)).to(f64)
    return natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(9, 3), torch.arange(9) % 2), structure)


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_a_loaded_matrix_is_the_saved_one_bit_for_bit_and_saved_again(make, tmp_path):
    M = make()
    v = randn(M.space.size)
    M.save(tmp_path / "one")
    natgrad.load(tmp_path / "one").save(tmp_path / "two")
    for again in (natgrad.load(tmp_path / "one"), natgrad.load(tmp_path / "two")):
        assert torch.equal(again @ v, M @ v)
        assert (type(again), again.space) == (type(M), M.space)


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_any_changed_bit_is_noticed(make, tmp_path):
    make().save(tmp_path / "whole")
    whole, r = (tmp_path / "whole").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*(r.randrange(header) for _ in range(60)), *(r.randrange(header, len(whole)) for _ in range(60))]:
        changed = bytearray(whole)
        changed[place] ^= 1 << r.randrange(8)
        refused(tmp_path, bytes(changed))


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_a_file_that_is_cut_short_or_goes_on_is_refused(make, tmp_path):
    make().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 50)), len(whole) - 1]:
        refused(tmp_path, whole[:length])
    for more in (b"\0", b"\n", whole):
        refused(tmp_path, whole + more)
    refused(tmp_path, whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # as after a crash


def refused(folder, content):
    path = folder / "harmed"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"harmed (is|has|holds) "):
        natgrad.load(path)


DENSE = json.dumps({"dict": [["kind", "Dense"], ["matrix", {"tensor": 0}], ["space", None]]})
FOREIGN = {
    "nothing": lambda: b"",
    "a few bytes": lambda: b"\0\0",
    "zeros": lambda: bytes(4096),
    "a header of 2⁶³ bytes": lambda: struct.pack("<Q", 2**63) + b"{}",
    "an empty header": lambda: struct.pack("<Q", 2) + b"{}",
    "text": lambda: b"a matrix\n1 2\n3 4\n",
    "JSON": lambda: json.dumps({"kind": "Dense"}).encode(),
    "a pickle": lambda: pickle.dumps({"kind": "Dense", "matrix": [1.0]}),
    "a pickle that would run code": lambda: pickle.dumps(Bomb()),
    "NumPy": lambda: np.ones(3).tobytes(),
    "a model's weights": lambda: safetensors.torch.save(nn.Linear(2, 3).state_dict()),
    "a model's weights with other metadata": lambda: safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}),
    "no checksum": lambda: safetensors.torch.save({"0": torch.eye(2)}, {"natgrad": DENSE, "format": "1"}),
    "another's checksum": lambda: safetensors.torch.save(
        {"0": torch.eye(2)}, {"natgrad": DENSE, "format": "1", "checksum": "0" * 64}
    ),
    "a checksum that is none": lambda: safetensors.torch.save(
        {"0": torch.eye(2)}, {"natgrad": DENSE, "format": "1", "checksum": "yes"}
    ),
    "no format": lambda: safetensors.torch.save({"0": torch.eye(2)}, {"natgrad": DENSE}),
}


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code of a file was run",)


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_refused(make, tmp_path):
    refused(tmp_path, make())


def test_a_file_of_torch_save_is_refused(tmp_path):
    torch.save(of_a_model("kfac").state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is not a safetensors file"):
        natgrad.load(tmp_path / "state.pt")


def of(kind, **arguments):
    return json.dumps({"dict": [["kind", kind], *([k, v] for k, v in arguments.items())]})


T, S = {"tensor": 0}, {"tensor": 1}
CRAFTED = {
    "a tensor that is not there": of("Diagonal", values={"tuple": [{"tensor": 9}]}, space=None),
    "an argument misspelt": of("Dense", matri=T, space=None),
    "an argument too many": of("Dense", matrix=T, space=None, more=1),
    "an argument missing": of("Kronecker", A=T),
    "an unknown kind": of("Toeplitz", c=T),
    "a kind that is a number": of(3),
    "a matrix that is none": of("Dense", matrix=S, space=None),
    "a matrix that is text": of("Dense", matrix="eye", space=None),
    "factors that do not fit": of("CenteredKronecker", covariance=T, mean={"tensor": 2}, output=T),
    "dtypes that do not fit": of("Kronecker", A=T, B={"tensor": 3}),
    "whole numbers": of("Kronecker", A={"tensor": 4}, B={"tensor": 4}),
    "a sum of nothing": of("Sum", terms={"list": []}),
    "a sum of numbers": of("Sum", terms={"list": [1, 2]}),
    "a multiple of nothing": of("Scaled", operator=None, factor=2.0),
    "a space alone": of("Space", shapes={"tuple": [{"tuple": [4]}]}, names=None),
    "a layout alone": of("Layout", form="plain", groups=1),
    "a tensor alone": json.dumps(T),
    "two keys": '{"a": 1, "b": 2}',
    "no key": "{}",
    "null": "null",
    "a number": "3",
    "NaN": "NaN",
    "text": '"abc"',
    "a list": "[1]",
    "no JSON": "{]",
    "nothing": "",
    "nested 900 deep": '{"list":[' * 900 + "]}" * 900,
    "nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
}


@pytest.mark.parametrize("structure", CRAFTED.values(), ids=CRAFTED)
def test_a_file_with_a_checksum_but_no_matrix_is_refused(structure, tmp_path):
    numbers = (torch.eye(2), torch.ones(2), torch.ones(3), torch.eye(2, dtype=f64), torch.eye(2, dtype=torch.int64))
    refused(tmp_path, b"".join(sealed({str(i): t for i, t in enumerate(numbers)}, structure)))


def test_a_matrix_with_parameters_called_like_a_checksum_is_loaded(tmp_path):
    model = nn.ModuleDict({'"checksum":"' + "0" * 64 + '"': nn.Linear(2, 2)})
    model.forward = lambda x: next(iter(model.values()))(x)
    F = natgrad.fisher(model, nn.MSELoss(), (torch.randn(5, 2), torch.randn(5, 2)))
    F.save(tmp_path / "matrix")
    assert torch.equal(natgrad.load(tmp_path / "matrix", model=model).to_dense(), F.to_dense())


class TestSaving:
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "matrix"
        Dense(spd(3, 0)).save(path)
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(
            OSError, match=r"matrix cannot be written \(No space left on device\); free space"
        ) as raised:
            Dense(spd(3, 1)).save(path)
        assert raised.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["matrix"]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
    def test_a_full_device(self):
        with pytest.raises(OSError, match="cannot be written \\(No space left on device"):
            Dense(spd(3, 0)).save("/dev/full")
        assert os.path.exists("/dev/full")

    def test_a_folder_that_may_not_be_written_to(self, tmp_path):
        folder = tmp_path / "read-only"
        folder.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        try:
            if os.access(folder, os.W_OK):
                pytest.skip("this user may write anywhere")
            with pytest.raises(PermissionError, match="matrix cannot be written"):
                Dense(spd(3, 0)).save(folder / "matrix")
        finally:
            folder.chmod(stat.S_IRWXU)

    @pytest.mark.parametrize("path", ["/proc/matrix", "/sys/matrix"])
    def test_a_folder_that_takes_no_files(self, path):
        if not os.path.isdir(os.path.dirname(path)):
            pytest.skip("not on this system")
        with pytest.raises(OSError, match="matrix cannot be written"):
            Dense(spd(3, 0)).save(path)

    @pytest.mark.parametrize("name", ["n" * 400, "none/matrix", "file/matrix", "folder", "a\0b"], ids=lambda n: n[:12])
    def test_a_path_that_is_none(self, name, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        with pytest.raises((OSError, ValueError)):
            Dense(spd(3, 0)).save(f"{tmp_path}/{name}")
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def test_a_link_stays_one(self, tmp_path):
        (tmp_path / "target").write_text("old")
        (tmp_path / "link").symlink_to("target")
        Dense(spd(3, 0)).save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert natgrad.load(tmp_path / "target").space.size == 3

    def test_the_mode_of_a_file_stays(self, tmp_path):
        path = tmp_path / "matrix"
        path.write_text("")
        path.chmod(0o640)
        Dense(spd(3, 0)).save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_new_file_has_the_mode_of_new_files(self, tmp_path):
        (tmp_path / "any").write_text("")
        Dense(spd(3, 0)).save(tmp_path / "matrix")
        assert (tmp_path / "matrix").stat().st_mode == (tmp_path / "any").stat().st_mode

    def test_an_interruption_leaves_what_was_there(self, tmp_path):
        (tmp_path / "file").write_text("old")

        def pieces():
            yield b"new"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", pieces())
        assert (tmp_path / "file").read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["none", "folder", "n" * 400, "file/matrix"], ids=lambda n: n[:12])
def test_what_is_no_file_is_an_error_of_the_system_with_the_path(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=name[:50]):
        load(tmp_path / name)
