"""What users get wrong about vectors, damping and the matrices themselves."""

import functools

import torch

from natgrad import linalg
from of_data_and_losses import X, fisher, net


@functools.cache
def matrix(structure: str = "kfac") -> linalg.Operator:
    torch.manual_seed(0)
    return fisher(structure=structure)


def ones() -> dict[str, torch.Tensor]:
    return {n: torch.ones_like(p) for n, p in net().named_parameters()}


def flat(**options) -> torch.Tensor:
    return torch.ones(matrix().space.size, **options)


def changed(name: str, value: object) -> dict[str, object]:
    return {**ones(), name: value}


EYE, PAIR = torch.eye(2), torch.ones(2, 2)
THREE = linalg.Kronecker(torch.eye(3), torch.eye(3))

# fmt: off
ROWS = [
    # Vectors
    ("names of another model", lambda: matrix() @ {"w": X}, ValueError,
     "BlockDiagonal @ v: the dict lacks '0.weight', ", " and has unknown 'w'; expected a dict with a tensor for each"),
    ("a tensor of another shape", lambda: matrix() @ changed("0.bias", X), ValueError,
     "BlockDiagonal @ v: 0.bias has shape (8, 4), expected (5,), as the parameter has"),
    ("no gradient", lambda: matrix() @ changed("0.bias", None), ValueError,
     "BlockDiagonal @ v: 0.bias is None; expected a Tensor of shape (5,)"),
    ("an array of NumPy", lambda: matrix() @ changed("0.bias", X[0].numpy()), ValueError,
     "BlockDiagonal @ v: 0.bias is a NumPy array; expected a Tensor of shape (5,)"),
    ("the parameters themselves", lambda: matrix() @ net().parameters(), ValueError,
     "BlockDiagonal @ v: got a generator, expected a dict with a tensor for each of '0.weight', "),
    ("a vector that is too short", lambda: matrix().quadratic(flat()[1:]), ValueError,
     "BlockDiagonal.quadratic(v): got a tensor of shape (42,), expected ", "or one flat tensor of 43"),
    ("another matrix", lambda: matrix() @ matrix(), ValueError,
     "BlockDiagonal @ v: got a BlockDiagonal, expected a dict"),
    ("a vector of another dtype", lambda: matrix().solve(flat(dtype=torch.float64), damping=1.0), ValueError,
     "BlockDiagonal.solve(v): 0.weight is torch.float64 on cpu, but the matrix is torch.float32 on cpu; expected "
     "the same: .to('cpu', torch.float32)"),
    ("a vector on another device", lambda: matrix() @ flat(device="meta"), ValueError,
     "0.weight is torch.float32 on meta, but the matrix is torch.float32 on cpu; expected the same"),
    ("NaN to solve for", lambda: matrix("implicit").solve(flat() * torch.nan, damping=1.0), ValueError,
     "43 entries of v are not finite, so conjugate gradients cannot solve; look for NaN or inf"),
    ("two tensors for three parts", lambda: linalg.Diagonal((EYE, EYE, EYE)) @ (EYE, EYE), ValueError,
     "Diagonal @ v: got 2 tensors, expected tensors of shapes (2, 2), (2, 2), (2, 2), or one flat tensor of 12"),
    # Damping and powers
    ("a negative damping", lambda: matrix().solve(ones(), damping=-1), ValueError,
     "damping=-1 is not usable: expected a number >= 0"),
    ("a damping that is NaN", lambda: matrix().logdet(damping=torch.nan), ValueError, "damping=nan is not usable: "),
    ("a damping in quotes", lambda: matrix().inverse(damping="1e-3"), ValueError, "damping='1e-3' is not usable: "),
    ("no damping where one is needed", lambda: matrix().solve(ones()), ValueError,
     "layer '2': the factor B with damping=0 is singular or indefinite (smallest eigenvalue ",
     "; pass a larger damping, say damping=1e-3"),
    ("no damping for a determinant", lambda: matrix().logdet(), ValueError, "layer '2': ", "say damping=1e-3"),
    ("no damping for draws", lambda: matrix().sample(2), ValueError, "layer '2': ", "say damping=1e-3"),
    ("a damping style that is misspelt", lambda: matrix().inverse(1.0, damping_style="factorized"), ValueError,
     "damping_style='factorized' is unknown: expected one of 'exact', 'centered', 'factored'; did you mean "
     "'factored'?"),
    ("a power in quotes", lambda: matrix().power("-0.5"), ValueError,
     "exponent='-0.5' is not usable: expected a finite number, such as -0.5"),
    ("a power that is NaN", lambda: matrix("dense").power(torch.nan, 1.0), ValueError, "exponent=nan is not usable: "),
    ("a scale that is infinite", lambda: matrix() * float("inf"), ValueError,
     "a matrix was scaled by inf; expected a finite number"),
    # Draws, orders, layers
    ("no draws", lambda: matrix().sample(0, damping=1.0), ValueError,
     "n=0 is not usable: expected a whole number of draws, at least 1"),
    ("half a draw", lambda: matrix().sample(0.5, damping=1.0), ValueError, "n=0.5 is not usable: "),
    ("draws from a seed", lambda: matrix().sample(2, damping=1.0, generator=0), TypeError,
     "generator is an int; expected a torch.Generator"),
    ("an order that is misspelt", lambda: matrix().to_dense(order="torhc"), ValueError,
     "order='torhc' is unknown: expected one of 'torch' (rows, as Tensor.flatten), 'vec' (columns); did you mean"),
    ("a layer that is not there", lambda: matrix().blocks["fc1"], KeyError,
     "no layer is called 'fc1'; expected one of '0', '2'"),
    ("a layer of a full matrix", lambda: matrix("dense").blocks["1"], KeyError, "no layer is called '1'; "),
    ("a layer of an implicit matrix", lambda: matrix("implicit").blocks["1"], KeyError, "no layer is called '1'; "),
    ("a determinant by products", lambda: matrix("implicit").logdet(damping=1.0), TypeError,
     "ImplicitGaussNewton has no exact logdet; use structure='dense' for a small model, 'block', 'kfac' or "
     "estimate_logdet(samples=...)"),
    ("one sample", lambda: matrix().estimate_trace(samples=1), ValueError,
     "samples=1 is not usable: expected a whole number, at least 2"),
    # The algebra by itself
    ("lists in place of factors", lambda: linalg.Kronecker([[1.0]], EYE), TypeError,
     "A is a list of 1; expected a Tensor of a floating dtype"),
    ("factors of whole numbers", lambda: linalg.Kronecker(EYE, EYE.long()), TypeError,
     "B has dtype torch.int64; expected"),
    ("factors of two dtypes", lambda: linalg.Kronecker(EYE, EYE.double()), ValueError,
     "A is torch.float32 on cpu, but B is torch.float64 on cpu; expected the same: B.to(A)"),
    ("a factor that is not square", lambda: linalg.Kronecker(EYE[:1], EYE), ValueError,
     "A has shape (1, 2); expected a square matrix, or its diagonal"),
    ("a matrix that is not square", lambda: linalg.Dense(EYE[:1]), ValueError,
     "matrix has shape (1, 2); expected a square one"),
    ("a diagonal by itself", lambda: linalg.Diagonal(EYE[0]), TypeError,
     "values is a Tensor of shape (2,); expected a tuple with a tensor for each part: (values,)"),
    ("a vector to be flattened", lambda: linalg.vec(EYE[0]), ValueError,
     "vec: W has shape (2,); expected a matrix, or a batch of them"),
    ("a mean of another size", lambda: linalg.homogeneous_inverse(EYE, torch.ones(3)), ValueError,
     "C has shape (2, 2) and m (3,); expected (d, d) and (d,)"),
    ("a sum of two sizes", lambda: THREE + linalg.Kronecker(EYE, EYE), ValueError,
     "the sum of two matrices needs the same parameters: the first acts on a tensor of shape (3, 3)"),
]
