"""natgrad's matrices in laplace-torch: `Laplace(model, "classification", backend=NatgradGGN)`.

laplace-torch (https://github.com/aleximmer/Laplace) fits its posteriors from the curvature that a back end computes.
This one gives it natgrad's full, Kronecker-factored and diagonal Gauss-Newton matrices. `pip install laplace-torch`
first.

    python examples/laplace_torch_backend.py
"""

import torch
from laplace import Laplace
from laplace.curvature import CurvatureInterface
from laplace.utils import Kron
from torch import nn

import natgrad
from natgrad.linalg import Homogeneous, Kronecker


class NatgradGGN(CurvatureInterface):
    """The Gauss-Newton matrix of the summed loss of a batch. For laplace-torch's two losses it is the Fisher matrix."""

    def matrix(self, x, y, structure):
        names = {id(p): n for n, p in self.model.named_parameters()}
        params = [names[id(p)] for p in self.params]
        return natgrad.fisher(self.model, self.lossfunc, (x, y), structure, centered=False, params=params), params

    def loss(self, x, y):
        with torch.no_grad():
            return self.factor * self.lossfunc(self.model(x), y)

    def full(self, x, y, **kwargs):
        H = self.factor * self.matrix(x, y, "dense")[0].to_dense()
        chosen = self.subnetwork_indices
        return self.loss(x, y), H if chosen is None else H[chosen[:, None], chosen]

    def diag(self, x, y, **kwargs):
        F, params = self.matrix(x, y, "diagonal")
        d = F.diagonal()
        H = self.factor * torch.cat([d[n].flatten() for n in params])
        return self.loss(x, y), H if self.subnetwork_indices is None else H[self.subnetwork_indices]

    def kron(self, x, y, N, **kwargs):
        """laplace-torch adds the factors of its batches one by one: output factors as sums, input factors as means."""
        F, params = self.matrix(x, y, "kfac")
        factors = {}
        for block, layer in zip(F.blocks.values(), F.layers.values(), strict=True):
            product = block.stacked if isinstance(block, Homogeneous) else block
            if not isinstance(product, Kronecker) or product.A.ndim != 2 or product.B.ndim != 2:
                raise NotImplementedError(f"laplace-torch has no form for the block of {layer.names}; use 'diag'")
            weight, *bias = layer.names
            columns = product.A.shape[0] - len(bias)
            factors[weight] = [product.B, product.A[:columns, :columns] * len(y) / N]
            factors |= {name: [product.B * product.A[-1, -1]] for name in bias}
        return self.loss(x, y), self.factor * Kron([factors[n] for n in params])


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), 50)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    for structure in ("full", "kron", "diag"):
        posterior = Laplace(model, "classification", "all", structure, backend=NatgradGGN)
        posterior.fit(data)
        print(f"{structure}: log marginal likelihood {posterior.log_marginal_likelihood().item():.3f}")
