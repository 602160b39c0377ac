"""Outputs, targets and options that a loss cannot take: each error names what came and what was expected."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from natgrad.losses import output_curvature
from oracles import close, f64, randn

N = 4


class TestBadInput:
    @pytest.mark.parametrize(
        ("loss", "output", "target", "match"),
        [
            (nn.CrossEntropyLoss(), (4, 3), torch.zeros(5).long(), r"\(4, 3\).*\(5,\).*expected.*\(4,\)"),
            (nn.CrossEntropyLoss(), (4, 3), torch.zeros(4, 1).long(), r"\(4, 3\).*\(4, 1\).*expected.*\(4,\)"),
            (nn.CrossEntropyLoss(), (4, 3, 2), torch.zeros(4).long(), r"\(4, 3, 2\).*\(4,\).*expected.*\(4, 2\)"),
            (nn.CrossEntropyLoss(), (4, 3), torch.zeros(4, 2), r"\(4, 3\).*\(4, 2\).*expected the same shape"),
            (nn.CrossEntropyLoss(), (3,), torch.tensor(1), r"\(3,\).*expected \(examples, classes"),
            (nn.MSELoss(), (4, 1), torch.zeros(4), r"MSELoss.*\(4, 1\).*\(4,\).*expected the same shape"),
            (nn.MSELoss(), (), torch.tensor(0.0), "scalar"),
            (nn.BCEWithLogitsLoss(), (4, 1), torch.zeros(4), r"BCEWith.*\(4, 1\).*\(4,\).*expected the same shape"),
            (nn.PoissonNLLLoss(), (4, 1), torch.zeros(4), r"Poisson.*\(4, 1\).*\(4,\).*expected the same shape"),
            (nn.GaussianNLLLoss(), (4, 1, 2), torch.zeros(4), r"Gauss.*\(4, 1\).*\(4,\).*expected the same shape"),
        ],
    )
    def test_shapes_that_do_not_fit(self, loss, output, target, match):
        with pytest.raises(ValueError, match=match):
            output_curvature(loss).check(torch.zeros(output), target)

    @pytest.mark.parametrize(
        ("loss", "target", "match"),
        [
            (nn.CrossEntropyLoss(), torch.zeros(4, dtype=torch.int32), "int32.*expected.*(int64|long)"),
            (nn.CrossEntropyLoss(), torch.zeros(4, dtype=torch.bool), "bool.*expected.*(int64|long)"),
            (nn.MSELoss(), torch.zeros(4, 3, dtype=torch.complex128), "complex128.*expected"),
            (nn.BCEWithLogitsLoss(), torch.zeros(4, 3, dtype=torch.int64), "int64.*expected.*float"),
            (nn.BCEWithLogitsLoss(), torch.zeros(4, 3, dtype=torch.bool), "bool.*expected.*float"),
            (nn.PoissonNLLLoss(), torch.zeros(4, 3, dtype=torch.complex128), "complex128.*expected counts"),
        ],
        ids=lambda x: str(x.dtype) if isinstance(x, torch.Tensor) else None,
    )
    def test_a_target_of_a_wrong_dtype(self, loss, target, match):
        with pytest.raises((ValueError, TypeError), match=match):
            output_curvature(loss).check(torch.zeros(4, 3), target)

    @pytest.mark.parametrize("output", [(4, 3), (4, 3, 2)])
    @pytest.mark.parametrize("ignored", [-1, 7])
    def test_an_ignored_class_index_may_be_out_of_range(self, output, ignored):
        target = torch.full((4, *output[2:]), 2)
        target[1] = ignored
        output_curvature(nn.CrossEntropyLoss(ignore_index=ignored)).check(torch.zeros(output), target)
        with pytest.raises(ValueError, match=rf"class index {ignored}; expected 0 to 2.*ignore_index=-100"):
            output_curvature(nn.CrossEntropyLoss()).check(torch.zeros(output), target)

    def test_bytes_at_positions(self):
        # torch takes them for class indices without positions only.
        with pytest.raises(ValueError, match=r"uint8.*expected.*target\.long\(\)"):
            output_curvature(nn.CrossEntropyLoss()).check(torch.zeros(4, 3, 2), torch.zeros(4, 2, dtype=torch.uint8))

    @pytest.mark.parametrize("bad", [-1, 3])
    @pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.3], dtype=f64)])
    def test_a_class_index_out_of_range(self, bad, weight):
        target, loss = torch.tensor([0, 1, 2, bad]), nn.CrossEntropyLoss(weight=weight)
        with pytest.raises((ValueError, IndexError), match=str(bad)):
            natgrad.fisher(nn.Linear(3, 3, dtype=f64), loss, (randn(4, 3), target))

    @pytest.mark.parametrize("size", [2, 4])
    def test_a_class_weight_of_another_length(self, size):
        output, target = randn(4, 3), torch.tensor([0, 1, 1, 0])
        loss = nn.CrossEntropyLoss(weight=torch.ones(size, dtype=f64), label_smoothing=0.1)
        with pytest.raises(ValueError, match=rf"weight.*{size}.*3"):
            output_curvature(loss).check(output, target)

    @pytest.mark.parametrize(
        "loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss, nn.GaussianNLLLoss]
    )
    def test_no_reduction(self, loss):
        with pytest.raises(ValueError, match=rf"{loss.__name__}.*reduction='none'.*'mean' or 'sum'"):
            output_curvature(loss(reduction="none"))

    @pytest.mark.parametrize(
        ("loss", "came"),
        [
            (nn.MultiLabelMarginLoss(), "MultiLabelMarginLoss"),
            (nn.MSELoss, "the class MSELoss"),
            (F.cross_entropy, "function"),
            ("mse", "str"),
            (None, "None"),
        ],
    )
    def test_a_loss_that_is_not_supported(self, loss, came):
        with pytest.raises(TypeError, match=rf"{came}.*expected.*nn.CrossEntropyLoss\(\), nn.MSELoss.*Likelihood"):
            inspect.unwrap(output_curvature)(loss)  # without the type checker of the test run

    def test_a_subclass_that_computes_something_else(self):
        class Focal(nn.CrossEntropyLoss):
            def forward(self, input, target):
                ce = F.cross_entropy(input, target, reduction="none")
                return ((1 - (-ce).exp()) ** 2 * ce).mean()

        with pytest.raises(TypeError, match=r"a Focal, .*forward of its own; expected.*nn.CrossEntropyLoss\(\)"):
            output_curvature(Focal())

    def test_a_subclass_that_computes_the_same(self):
        class Named(nn.MSELoss):
            name = "error"

        close(output_curvature(Named()).product(randn(N), randn(N), randn(N)), 2 * randn(N))

    def test_an_unknown_kind(self):
        with pytest.raises(ValueError, match=r"kind='gn'.*expected.*'gauss_newton'"):
            output_curvature(nn.MSELoss(), "gn")

    def test_an_unknown_estimator(self):
        output, target = randn(N, 3), torch.tensor([2, 1, 0, 1])
        with pytest.raises(ValueError, match=r"estimator='MC'.*expected.*'mc'"):
            list(output_curvature(nn.CrossEntropyLoss()).columns(output, target, "MC"))
