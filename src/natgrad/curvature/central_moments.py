"""The central moments of a layer's inputs, up to the fourth, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class CentralMoments:
    """Count, mean and the sums of the second, third and fourth powers of the differences from the mean, of each input,
    in float64. The moments of several batches are those of all cases: `+` moves both sums to the common mean.

    Reference: Pébay (2008), "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments", Sandia report SAND2008-6212.
    """

    count: Tensor
    """Number of cases n, a scalar."""
    mean: Float[Tensor, " i"]
    """`m = Σ h / n`."""
    second: Float[Tensor, " i"]
    """`Σ (h − m)²`."""
    third: Float[Tensor, " i"]
    fourth: Float[Tensor, " i"]

    @classmethod
    def of(cls, x: Float[Tensor, "n i"]) -> CentralMoments:
        """The moments of these cases."""
        x = x.double()
        mean = x.mean(0)
        d = x - mean
        squares = d.square()
        count = mean.new_tensor(float(len(x)))
        return cls(count, mean, squares.sum(0), (squares * d).sum(0), squares.square().sum(0))

    def repeated(self, times: int) -> CentralMoments:
        """Each input so many times."""
        sums = (t.repeat_interleave(times) for t in (self.mean, self.second, self.third, self.fourth))
        return CentralMoments(self.count, *sums)

    @property
    def mass(self) -> Tensor:
        return self.count

    def around(self, mean: Tensor) -> CentralMoments:
        """The sums of powers of the differences from another mean, with the same count."""
        d = torch.where(self.count > 0, self.mean - mean, 0.0)
        square = d.square()
        return CentralMoments(
            self.count,
            mean,
            self.second + self.count * square,
            self.third + 3 * d * self.second + self.count * square * d,
            self.fourth + 4 * d * self.third + 6 * square * self.second + self.count * square.square(),
        )

    def __add__(self, other: CentralMoments) -> CentralMoments:
        n = self.count + other.count
        share = torch.where(n > 0, other.count / n, 0.0)
        mean = self.mean + share * (other.mean - self.mean)
        a, b = self.around(mean), other.around(mean)
        return CentralMoments(n, mean, a.second + b.second, a.third + b.third, a.fourth + b.fourth)

    def __rmul__(self, factor: float) -> CentralMoments:
        """The same averages with `factor` times the weight."""
        sums = (factor * t for t in (self.second, self.third, self.fourth))
        return CentralMoments(factor * self.count, self.mean, *sums)

    def is_finite(self) -> Tensor:
        """A boolean scalar: nothing in here is NaN or infinite."""
        return torch.isfinite(self.fourth.sum() + self.mean.sum() + self.count)
