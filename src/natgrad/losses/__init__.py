"""The curvature `D` of losses in the output: products, factors `S Sᵀ = D`, and samples.

Torch's own loss modules have closed forms. `Likelihood` accepts any distribution of `torch.distributions`, and `Convex`
accepts any function.
"""

from typing import Any

from torch import nn

from natgrad.checks.values import described
from natgrad.losses.alignment import Alignment
from natgrad.losses.base import ESTIMATORS, OutputCurvature
from natgrad.losses.convex import Convex, ConvexCurvature
from natgrad.losses.elementwise import Bernoulli, Poisson, SquaredError
from natgrad.losses.gaussian import Gaussian
from natgrad.losses.hinge import MultiMargin
from natgrad.losses.labels import Cosine, HingeEmbedding, Ranking, Triplet
from natgrad.losses.likelihood import Likelihood, LikelihoodCurvature
from natgrad.losses.logarithms import Divergence, LogProbabilities, Probabilities
from natgrad.losses.margin import MultiLabelSoftMargin, SoftMargin
from natgrad.losses.robust import AbsoluteError, Huber, SmoothAbsoluteError
from natgrad.losses.softmax import Softmax

__all__ = ["ESTIMATORS", "Convex", "Likelihood", "OutputCurvature", "output_curvature"]

# A new loss is one line here.
_KNOWN: dict[type[nn.Module], type[OutputCurvature]] = {
    nn.CrossEntropyLoss: Softmax,
    nn.MSELoss: SquaredError,
    nn.BCEWithLogitsLoss: Bernoulli,
    nn.PoissonNLLLoss: Poisson,
    nn.GaussianNLLLoss: Gaussian,
    nn.NLLLoss: LogProbabilities,
    nn.KLDivLoss: Divergence,
    nn.BCELoss: Probabilities,
    nn.L1Loss: AbsoluteError,
    nn.SmoothL1Loss: SmoothAbsoluteError,
    nn.HuberLoss: Huber,
    nn.SoftMarginLoss: SoftMargin,
    nn.MultiLabelSoftMarginLoss: MultiLabelSoftMargin,
    nn.MultiMarginLoss: MultiMargin,
    nn.HingeEmbeddingLoss: HingeEmbedding,
    nn.MarginRankingLoss: Ranking,
    nn.CosineEmbeddingLoss: Cosine,
    nn.TripletMarginLoss: Triplet,
    nn.TripletMarginWithDistanceLoss: Triplet,
    nn.CTCLoss: Alignment,
    Likelihood: LikelihoodCurvature,
    Convex: ConvexCurvature,
}
_OWN = (Likelihood, Convex)


def output_curvature(loss: nn.Module, kind: str = "fisher") -> OutputCurvature:
    """The output-space curvature of a loss module.

    Args:
        loss: an instance of one of torch's losses (`docs/losses.md` lists them), `natgrad.losses.Likelihood` or
            `natgrad.losses.Convex`.
        kind: `"fisher"`: `D = E[s sᵀ]`, where `s` is the loss's gradient in the output at a label drawn from the model.
            `"gauss_newton"`: the loss's Hessian in the output at the target. The two are equal for canonical links:
            cross-entropy, squared error, logistic losses, Poisson with log rates.

    Raises:
        TypeError: if the loss is not an instance of a supported class, or overrides its `forward`.
        ValueError: if the kind is unknown, or the loss's reduction is neither `"mean"` nor `"sum"`.

    Example:
        >>> import torch
        >>> rates, counts = torch.tensor([2.0, 4.0]), torch.tensor([4.0, 4.0])
        >>> loss = nn.PoissonNLLLoss(log_input=False, eps=0.0)
        >>> v = torch.ones(2)
        >>> output_curvature(loss).product(rates, counts, v)  # 1/rate
        tensor([0.5000, 0.2500])
        >>> output_curvature(loss, "gauss_newton").product(rates, counts, v)  # count/rate²
        tensor([1.0000, 0.2500])

    Reference: Martens (2014), arXiv:1412.1193, sections 8 and 9.
    """
    for known, curvature in _KNOWN.items():
        if isinstance(loss, known) and type(loss).forward is known.forward:
            return curvature(loss, kind)
    came = described(loss)
    if isinstance(loss, tuple(_KNOWN)):
        came += ", a subclass that may compute another loss in a forward of its own"
    raise TypeError(
        f"loss is {came}; expected an instance of one of nn.CrossEntropyLoss(), nn.MSELoss() and torch's other losses, "
        "or natgrad.losses.Likelihood(fn) for a distribution, or natgrad.losses.Convex(fn) for a loss of one's own"
        + _in_its_place(loss)
    )


def _in_its_place(loss: Any) -> str:
    """The end of the message: the supported loss that was probably meant, by a function or a class of its name."""
    if isinstance(loss, nn.MultiLabelMarginLoss):
        return ". nn.MultiLabelSoftMarginLoss(), whose labels are 0 and 1, is supported"
    plain = {_plain(known.__name__): known.__name__ for known in _KNOWN if known not in _OWN}
    name = plain.get(_plain(getattr(loss, "__name__", type(loss).__name__)))
    return f"; did you mean nn.{name}()?" if name else ""


def _plain(name: str) -> str:
    """`"crossentropy"` of `"CrossEntropyLoss"` and of `"cross_entropy"`."""
    plain = name.lower().replace("_", "").removesuffix("loss")
    return plain.replace("binarycrossentropy", "bce")
