"""K-FAC: the natural gradient with a Kronecker-factored, centered curvature, and its relatives."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.cases import Cases, Layer, read_cases
from natgrad.capture.recorder import Recorder
from natgrad.checks.values import check_choice, check_count, check_flag, check_max_dim, check_number, check_within
from natgrad.curvature.blocks import assemble, named_blocks
from natgrad.curvature.moments import MAX_DIM, SHARING, AffineMoments
from natgrad.distributed.assignment import assign, cost
from natgrad.distributed.packing import leaves
from natgrad.distributed.reduction import Keep
from natgrad.distributed.sharding import Shards
from natgrad.linalg import Block, BlockDiagonal
from natgrad.linalg.precision import matmul_precision as precision_of_products
from natgrad.linalg.state import dump, restore
from natgrad.optim.adaptive import Adaptive
from natgrad.optim.batch import Batch, Objective, Sharing
from natgrad.optim.damping import LevenbergMarquardt, weighted_median
from natgrad.optim.decay import Decay
from natgrad.optim.interval import Interval
from natgrad.optim.ladder import Ladder
from natgrad.optim.orthogonal import adam, nesterov, orthogonal_directions, take_in_squares
from natgrad.optim.output import Way
from natgrad.optim.parameter_groups import Groups
from natgrad.optim.running import RUNNING, Statistics
from natgrad.optim.vectors import Vector, gram

ENOUGH = 250
"""Cases that suffice for the moments of one batch: examples, and where positions count, those of every example."""
MOST_THINNED = 4
RELATIVE_DAMPING = 0.3
"""`ε` of the one-sided structure, in units of the mean eigenvalue of a layer's input factor."""


class KFAC(Adaptive):
    """Natural-gradient descent with K-FAC's curvature, everything adaptive by default.

    For a layer `a = W h + b` with `m = E[h]`, `C = cov(h)` and output factor `B`, the centered step is

        ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹        Δb = B⁻¹ ∇_b − ΔW m        θ ← θ − α Δ + μ δ

    with `δ` the previous step. `α` and `μ` minimize the quadratic model with the exact Fisher of the batch.

    Args:
        model: the module to train. Every trainable parameter must belong to a layer of some kind (`docs/layers.md`).
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`, `nn.PoissonNLLLoss` or
            `natgrad.losses.Likelihood`.
        params: which parameters to train: None for all that are trainable, names, a predicate on names, tensors, or a
            list of groups, `{"params": ..., "lr": ..., "momentum": ..., "weight_decay": ...}`.
        lr: the step size `α`; None: from the quadratic model, at every step.
        momentum: `μ`; None: from the quadratic model, at every step. Where `lr` and `momentum` are both numbers, the
            step is that of `torch.optim.SGD` on a preconditioned gradient, `v ← μ v + ∇`, `θ ← θ − α F⁻¹ v`.
        damping: `λ`, in units of the loss's mean whatever the reduction; None: calibrated on the first batch,
            then Levenberg-Marquardt. With `structure="input"` it is `ε`, in units of the inputs' second moment; None:
            in units of its mean eigenvalue, 0.3 where `lr` and `momentum` are numbers, else adapted likewise.
        weight_decay: `η`, adds `η/2 ‖θ‖²` to the objective as the user evaluates it.
        decoupled_weight_decay: multiply by `1 − α η` at each step instead, as AdamW does.
        structure: `"kfac"`; `"ekfac"`: K-FAC's eigenbases, every `bases_every` steps, with the second moments of the
            gradients in them; `"diagonal"`; `"input"`: `C ⊗ I`, which needs no backward pass of its own,
            `ΔW = (∇_W − ∇_b mᵀ)(C + εI)⁻¹`, and plain gradients for parameters of no such layer; `"identity"`: no
            preconditioning.
        orthogonalize: of `structure="input"`, replace every `ΔW` by the nearest orthogonal matrix, times
            `0.2 √max(d_out, d_in)`, which makes it as long as AdamW's; all that has no input factor, biases and
            embeddings, takes Adam's step. A group may have its own `"orthogonalize"`.
        centered: hold weight and bias apart, with the covariance of the inputs.
        bias_update: `"exact"`, or `"simple"`: `Δb = B⁻¹ ∇_b`, whatever the weights do.
        damping_style: `"factored"` (two Cholesky factorizations a layer) or `"exact"` (two eigenbases, twice the
            products). None: factored where centered; else exact, as the homogeneous factors then damp the bias
            by the weight's share and stall it.
        max_kl: a bound on the predicted KL divergence `½ δᵀFδ` of a step, which is shortened to keep it.
        average: keep averages of the parameters, whose weights fall by this factor a step (and faster at first), for
            evaluation within `with opt.averaged():`; None: none.
        estimator: `"mc"` (labels drawn from the model), `"exact"` or `"empirical"`.
        sharing: `"expand"` or `"reduce"`, for layers used at several positions.
        statistics_every: steps between updates of the moments. None: 10 where centered or for `"input"`, else 5, as the
            homogeneous input factor holds the mean of the inputs, which moves faster than their covariance; and where
            `lr` or `momentum` is adaptive, at first fewer, a tenth of the steps so far.
        statistics_share: the share of a batch's examples that the moments are of, as one of every two, three, and so
            on, in turn. None: a quarter, or more where that would be fewer than 250 cases of some layer, examples times
            positions, or fewer than two examples.
        inverses_every: steps between updates of the inverses. None: 20 where centered or for `"input"`, else 5; at
            first fewer, likewise.
        bases_every: steps between new bases of `"ekfac"`. None: 100.
        adapt_every: steps between updates of the damping and of the ratio of `α` and `μ`.
        damping_decay: the least factor per step by which the damping may fall.
        damping_floor: the damping falls no further than this times a typical curvature: the mean of a layer's diagonal,
            in centered coordinates where it is centered, and the median of that over the parameters. None: 1 where
            centered, else 0.03, as the means of the inputs count in it.
        decay: the weight of the past in the moving average of the moments, each time they are updated.
        max_dim: factors of more rows than this are kept as their diagonals.
        matmul_precision: of the float32 products of the direction and of the quadratic model, as in
            `torch.set_float32_matmul_precision`: a direction from sampled factors, and the length of a step, need few
            digits. `"medium"` is bfloat16 on CPUs that multiply it, TF32 on GPUs. The moments' own are `"high"` then.
            None: as torch is set.
        output: how the loss's input is made of what the model returns, say `lambda r: r.logits.transpose(1, 2)`;
            needed where that is neither one of the tensors returned nor a view of one.
        generator: the source of the random labels. Default: one seeded by `torch.initial_seed()`.

    Raises:
        TypeError: if the loss is not supported, or is of a model that returns two tensors (`nn.GaussianNLLLoss`).
        ValueError: if an option is out of range.
        NotImplementedError: by `loss`, if a parameter is not part of an affine map; it is named.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = natgrad.KFAC(model, torch.nn.CrossEntropyLoss())
        >>> x = torch.randn(64, 4); y = (x[:, 0] > 0).long()
        >>> for _ in range(20):
        ...     loss = opt.loss(model(x), y)
        ...     opt.zero_grad(); loss.backward(); opt.step()
        >>> loss.item() < 0.1
        True

    Reference: Martens & Grosse (2015), "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature", arXiv:1503.05671.
    """

    _key = "kfac"
    _for_many_ranks = True
    _what_is_inverted = "a factor"
    _tolerated_rise = 0.5

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        params: Groups = None,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        structure: str = "kfac",
        orthogonalize: bool = False,
        centered: bool = True,
        bias_update: str = "exact",
        damping_style: str | None = None,
        max_kl: float | None = None,
        average: float | None = None,
        estimator: str = "mc",
        sharing: str = "expand",
        statistics_every: int | None = None,
        statistics_share: float | None = None,
        inverses_every: int | None = None,
        bases_every: int | None = None,
        adapt_every: int = 8,
        damping_decay: float = 0.8,
        damping_floor: float | None = None,
        decay: float = 0.8,
        max_dim: int = MAX_DIM,
        matmul_precision: str | None = "medium",
        output: Way | None = None,
        generator: torch.Generator | None = None,
    ):
        check_choice("structure", structure, tuple(RUNNING))
        check_choice("bias_update", bias_update, ("exact", "simple"))
        check_choice("sharing", sharing, SHARING)
        for name, flag in (("centered", centered), ("orthogonalize", orthogonalize)):
            check_flag(name, flag)
        one_sided = structure == "input"
        if orthogonalize and not one_sided:
            raise ValueError(
                f"orthogonalize=True needs structure='input'; got structure={structure!r}: use that, or leave it out"
            )
        damping_style = damping_style or ("factored" if centered else "exact")
        check_choice("damping_style", damping_style, ("exact", "factored"))
        adaptive = lr is None or momentum is None
        growing = adaptive and statistics_every is None, adaptive and inverses_every is None
        if statistics_every is None:
            statistics_every = 10 if one_sided or centered else 5
        if inverses_every is None:
            inverses_every = 20 if one_sided or centered else 5
        bases_every = 100 if bases_every is None else bases_every
        for name, every in (
            ("statistics_every", statistics_every),
            ("inverses_every", inverses_every),
            ("bases_every", bases_every),
            ("adapt_every", adapt_every),
        ):
            check_count(name, every, "steps")
        check_within("decay", decay, "[0, 1)")
        check_within("damping_decay", damping_decay, "(0, 1]")
        check_within("statistics_share", statistics_share, "(0, 1]", optional=True)
        if damping_floor is None:
            damping_floor = 1.0 if centered and structure in ("kfac", "ekfac") else 0.03
        check_number("damping_floor", damping_floor)
        check_max_dim(max_dim)
        self._relative = damping is None and one_sided
        if damping is None and structure in ("input", "identity") and None not in (lr, momentum):
            damping = RELATIVE_DAMPING
        super().__init__(
            model,
            loss,
            params=params,
            lr=lr,
            momentum=momentum,
            damping=damping,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            max_kl=max_kl,
            average=average,
            estimator=estimator,
            adapt_every=adapt_every,
            matmul_precision=matmul_precision,
            output=output,
            generator=generator,
            more={"orthogonalize": orthogonalize},
        )
        if max_kl is not None and orthogonalize and self._is_fixed():
            raise ValueError("max_kl needs the quadratic model where orthogonalize=True; leave out lr, or max_kl")
        self._rule = LevenbergMarquardt(damping_decay**adapt_every, damping_floor)
        self.structure, self.orthogonalize = structure, orthogonalize
        self.centered, self.bias_update, self.damping_style = centered, bias_update, damping_style
        self.sharing, self.decay, self.max_dim = sharing, decay, max_dim
        self.statistics_every, self.statistics_share = statistics_every, statistics_share
        self.inverses_every, self.bases_every = inverses_every, bases_every
        self._statistics_interval = Interval(statistics_every, growing[0])
        self._inverses_interval = Interval(inverses_every, growing[1])
        self._running = RUNNING[structure](centered, sharing, max_dim)
        self._owners: dict[tuple[str, ...], int] = {}  # of layers by their parameters, where those are sharded
        self._inverse: dict[str, Block] | None = None  # by layer
        self._inverse_age = 0
        self._bases_age: int | None = None
        self._last_statistics: int | None = None  # at which step
        self._spoiled = False  # some averages were lost, and new ones are wanted at once

    def _chosen(self) -> dict[str, Any]:
        return {"structure": self.structure} | ({} if self.centered else {"centered": False})

    def _layers_known(self) -> list[str]:
        return [layer.label for layer in self._running.layers]

    # Statistics ----------------------------------------------------------------------------------------

    def _statistics_due(self) -> bool:
        if self.structure == "identity":
            return False
        if self._last_statistics is None or self._spoiled:
            return True
        return self._steps - self._last_statistics >= self._statistics_interval.steps(self._steps)

    def _check_recorded(self, recorder: Recorder, output: Tensor) -> None:
        if self.structure not in ("input", "identity"):  # they take what they have no layer for as it is
            super()._check_recorded(recorder, output)

    def _observe(self, batch: Batch, recorder: Recorder, output: Tensor) -> None:
        draws = self._running.reads_gradients
        cases = read_cases(
            recorder.uses,
            output,
            self._curvature.columns(output, batch.target, self.estimator, generator=self._labels()) if draws else (),
            batch.mass,
            self._precision,
            ignored=self._curvature.ignored(output.detach(), batch.target),
            sampled=self.estimator == "mc" or not draws,
        )
        every = self._thinning(cases)
        if every > 1:
            cases = cases.every(every, start=self._steps // self.statistics_every % every)
        with precision_of_products("high" if self.matmul_precision else None):  # in bfloat16 they would be too coarse
            batch.statistics = self._running.observe(cases)
        if not batch.statistics.finite():
            batch.fault = "the statistics are not finite"

    def _follow_along(self, recorder: Recorder, output: Tensor, target: Tensor) -> None:
        if not (self._running.reads_gradients and output.requires_grad):
            return
        one, its_target = output.detach().new_zeros(1, *output.shape[1:]), target.new_zeros(1, *target.shape[1:])
        for _ in self._curvature.columns(one, its_target, self.estimator, generator=self._labels()):
            edges = [use.edge for use in recorder.uses]
            torch.autograd.grad(output, edges, torch.zeros_like(output), retain_graph=True, allow_unused=True)

    def _thinning(self, cases: Cases) -> int:
        """Of how many examples the moments take one."""
        if self.statistics_share is not None:
            return math.floor(1 / self.statistics_share)
        rows = cases.rows()
        count = rows if self.sharing == "reduce" else cases.fewest()
        return max(1, min(count // ENOUGH, MOST_THINNED, rows // 2))

    def _labels(self) -> torch.Generator:
        """The source of the random labels: on several ranks, of this rank, step and batch, as what one rank draws is
        not to be the others' affair, nor a checkpoint's."""
        if self._world.size == 1:
            return self._generator
        which = ((self._generator.initial_seed() * 1_000_003 + self._steps) * 4099 + self._world.rank) * 1_009
        return torch.Generator(self._generator.device).manual_seed((which + len(self._pending)) % 2**63)

    @property
    def _precision(self) -> torch.dtype:
        """Of the factors and what they multiply: at least float32, as averages and inverses need."""
        own = next(iter(self._parameters.values())).dtype
        return torch.promote_types(own, torch.float32)

    def _share(self, pending: list[Batch]) -> None:
        """The sums go on their way before the backward, so that they travel while it runs."""
        if self._world.size == 1 or self._place.shards is not None:
            return
        fresh = [b for b in pending if b.sharing is None]
        own = [b.statistics for b in fresh if b.statistics is not None]
        ready = len(own) == len(fresh) and not any(b.fault for b in fresh)
        (count,) = self._world.numbers([float(ready)], "who has statistics")
        result = reduce(Statistics.__add__, own).begun(self._world) if count == self._world.size else None
        for b in fresh:
            b.sharing = Sharing(fresh, result)

    def _arrived(self, objective: Objective) -> list[Statistics] | None:
        """The ranks' statistics of this step's batches, if they are under way on all ranks."""
        if self._place.shards is not None:
            return None
        sharings = list({id(s): s for b in objective.batches if (s := b.sharing) is not None}.values())
        sent = [id(b) for s in sharings if s.result is not None for b in s.batches]
        (count,) = self._world.numbers([float(sent == [id(b) for b in objective.batches] != [])], "what was sent")
        if count < self._world.size:
            return None
        return [s.result() for s in sharings if s.result is not None]

    def _take_in(self, objective: Objective, gradients: Vector) -> None:
        new = [b.statistics for b in objective.batches if b.statistics is not None]
        known = set(self._running.layers)
        if (self._world.size > 1 or self._place.shards) and self._statistics_due():
            arrived = self._arrived(objective)
            if arrived is None:
                own = reduce(Statistics.__add__, new, Statistics())
                arrived = [self._reduced(own.completed(self._world) if objective.idle else own)]
            new = arrived
        taken = self.diagnostics["statistics"] = self._running.take_in(new, self.decay)
        self._spoiled = self._spoiled and not taken
        if taken:
            self._last_statistics = self._steps
        if not known.issuperset(self._running.layers):
            self._expire()  # the inverse has not all layers
        layers = self._running.total.moments
        thinned = {layer.label: m.diagonals for layer, m in layers.items() if isinstance(m, AffineMoments)}
        if self._running.reads_gradients:
            self.diagnostics["diagonal_factors"] = {label: factors for label, factors in thinned.items() if factors}
            self._check_covered(gradients)

    @property
    def _is_spread(self) -> bool:
        """Whether each layer's averages and inverse are on one rank alone, as parameters are sharded."""
        return self._place.shards is not None and self._running.can_be_elsewhere

    @property
    def _shards(self) -> Shards:
        assert self._place.shards is not None
        return self._place.shards

    def _reduced(self, own: Statistics) -> Statistics:
        """The statistics of all ranks; where parameters are sharded, each layer's on the rank that is to have it."""
        if self._place.shards is None:
            return own.reduced(self._world)
        shards = self._place.shards
        sizes: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for layer, m in own.moments.items():
            sizes[layer.names] += cost(t.shape for t in leaves(vars(m), Tensor))
        more = {names: size for names, size in sizes.items() if names not in self._owners}
        self._owners |= assign(more, shards.size)
        if not self._is_spread:
            return own.reduced(self._world)
        kept = own.reduced(self._world, Keep(shards.world, self._owners, shards.copies))
        others = (layer for layer in own.moments if layer not in kept.moments)
        self._running.elsewhere = list(dict.fromkeys([*self._running.elsewhere, *others]))
        return kept

    def _check_covered(self, gradients: Vector) -> None:
        covered = {n for layer in self._running.layers for n in layer.names}
        for n in gradients:
            if n not in covered:
                raise NotImplementedError(
                    f"{n!r} has a gradient but there are no statistics of it: it was not used in the last forward that "
                    "took them. If it comes and goes use statistics_every=1, else freeze it with requires_grad_(False)"
                )

    def _names(self, gradients: Vector) -> Sequence[str]:
        """Those that have a gradient, and the others of their layers: a layer moves as a whole, or not at all."""
        layers = self._running.layers
        partners = {n for layer in layers if any(m in gradients for m in layer.names) for n in layer.names}
        return [n for n in self._parameters if n in gradients or n in partners]

    # Inverses ------------------------------------------------------------------------------------------

    def _prepare(self, damping: float, decay: Decay) -> None:
        if self._bases_age is not None:
            self._bases_age += 1
        if self._inverse is None or self._inverse_age >= self._inverses_interval.steps(self._steps):
            self._refresh(damping, decay)
        self._inverse_age += 1

    def _refresh(self, damping: float, decay: Decay) -> None:
        self.diagnostics["inverses"] = True
        self._inverse_age = 0
        if not self._running.layers:
            return
        if self.structure == "ekfac" and (self._bases_age is None or self._bases_age >= self.bases_every):
            self._running.turn(self._world)
            self._bases_age = 0
        blocks, before = self._own_blocks(), self._inverse or {}
        # Exact in centered coordinates: a step does not depend on a shift of a layer's inputs.
        exact = "centered" if self.damping_style == "exact" else self.damping_style
        style = "relative" if self._relative else exact

        def inverse(name: str, block: Block) -> dict[str, Any]:
            its_damping = damping + (decay.of(block.names[0]) if self._running.reads_gradients else 0.0)
            last, faults = before[name].operator if name in before else None, Counter[str]()
            ladder = Ladder(lambda op, λ: self._running.inverse(op, λ, style), faults)
            return {"operator": ladder.inverse(name, block.operator, its_damping, last), "faults": dict(faults)}

        work = {name: partial(inverse, name, block) for name, block in blocks.items()}
        if self._is_spread:
            found = self._shards.world.together(work, "the inverses")
        else:
            costs = {
                name: cost(t.shape for t in leaves(dump(block.operator), Tensor)) for name, block in blocks.items()
            }
            found = self._world.share(work, costs, "the inverses")
        for each in found.values():
            self._faults.update(each["faults"])
        self._inverse = {name: block.with_operator(found[name]["operator"]) for name, block in blocks.items()}

    def _expire(self) -> None:
        self._inverse_age = self.inverses_every  # at least what is due
        lost = self._running.drop_spoiled()
        if self._is_spread:
            lost = set().union(*self._shards.world.gather(lost, "the layers whose averages were lost"))
            self._running.elsewhere = [layer for layer in self._running.elsewhere if layer not in lost]
        if lost:
            self._spoiled, self._inverse = True, None

    def _damped_gram(self, directions: list[Vector], damping: float) -> Tensor:
        """Of the coordinates that the inverse is damped in, so that a step's length, too, does not depend on a shift of
        a layer's inputs."""
        if self.structure == "input":  # there the damping is in units of the inputs
            return torch.zeros(len(directions), len(directions), dtype=torch.float64)
        precision = self._precision
        return damping * gram([self._in_coordinates({n: t.to(precision) for n, t in d.items()}) for d in directions])

    def _in_coordinates(self, d: Vector) -> Vector:
        usable = {names for names in self._usable(d) if len(names) > 1}
        blocks = [b for b in (self._inverse or {}).values() if b.names in usable and b.operator.is_centered]
        if self._place.shards is not None:
            owners = {n: rank for names, rank in self._owners.items() if names in usable for n in names}
            blocks = [block for block in blocks if self._owners[block.names] == self._shards.rank]
            whole = self._shards.gathered(d, owners, {n: self._parameters[n].shape for n in owners})
            d = {n: t for n, t in d.items() if n not in owners} | whole
        for block in blocks:
            d = d | block.named(block.operator.coordinates(block.parts(d)))
        return d

    # Direction -----------------------------------------------------------------------------------------

    def _see_gradient(self, g: Vector) -> None:
        if self.orthogonalize:
            matrices = {layer.names[0] for layer in self._running.layers} & self._to_orthogonalize(g)
            take_in_squares({n: gradient for n, gradient in g.items() if n not in matrices}, self._state_of)

    def _to_orthogonalize(self, v: Vector) -> set[str]:
        return {n for group, names in self._by_group(v) if group["orthogonalize"] for n in names}

    def _with_momentum(self, g: Vector) -> Vector:
        v = super()._with_momentum(g)
        return nesterov(v, g, self._by_group(g), self._state_of) if self.orthogonalize else v

    def _usable(self, v: Vector) -> set[tuple[str, ...]]:
        """The names of the blocks whose parameters are all in `v` (others are frozen, or not part of this loss), and
        are to be orthogonalized where any is."""
        own = set() if self._inverse is None else {layer.names for layer in self._running.layers}
        chosen = self._to_orthogonalize(v) if self.orthogonalize else v
        return {names for names in own if names[0] in chosen and all(n in v for n in names)}

    def _direction(self, v: Vector) -> Vector:
        v = {n: t.to(self._precision) for n, t in v.items()} if self._running.layers else v
        usable = self._usable(v)
        if self.orthogonalize:
            weights = {names[0] for names in usable}
            out = adam({n: d for n, d in v.items() if n not in weights}, self._state_of)
        else:
            out = {} if self._running.reads_gradients else dict(v)
        blocks = [] if self._inverse is None else [b for b in self._inverse.values() if b.names in usable]
        if self._place.shards is None:
            out |= self._by_block(blocks, v, out)
        else:
            owners = {n: rank for names, rank in self._owners.items() if names in usable for n in names}
            out |= self._by_owner(self._place.shards, owners, blocks, v, out)
        # In the parameters' order, by which sums over them are the same to the last bit whatever that of the layers.
        return {n: out[n].to(p.dtype) for n, p in self._parameters.items() if n in out and p.requires_grad}

    def _by_block(self, blocks: list[Block], v: Vector, rest: Vector) -> Vector:
        """The directions of whole layers; `rest` are those of their parts that have no factor, where that is so."""
        simple = self.bias_update == "simple"
        if self.orthogonalize:
            return orthogonal_directions(v, rest, blocks, simple=simple, precision=self.matmul_precision)
        out: Vector = {}
        for block in blocks:
            with precision_of_products(self.matmul_precision):
                parts = block.operator.apart(block.parts(v))
            # The mean pre-activation moves as it should in all digits: with inputs far from zero, there are few left.
            out |= block.named(parts if simple else block.operator.from_coordinates(parts))
        return out

    def _by_owner(self, shards: Shards, owners: dict[str, int], blocks: list[Block], v: Vector, rest: Vector) -> Vector:
        """The same from shards and to shards: each layer's on the rank that has its inverse."""
        shapes = {n: self._parameters[n].shape for n in owners}
        own = [block for block in blocks if self._owners[block.names] == shards.rank]
        whole = shards.gathered(v, owners, shapes)
        among = {n: rank for n, rank in owners.items() if self.orthogonalize and n in rest}
        found = self._by_block(own, whole, shards.gathered(rest, among, shapes))
        return shards.scattered(found, owners, shapes, next(iter(v.values())))

    def curvature(self) -> BlockDiagonal:
        """The running matrix, per unit of the loss's mean and without damping.

        Raises:
            RuntimeError: before the first step.
            TypeError: with `structure="identity"`, which has none.
        """
        if self.structure == "identity":
            raise TypeError("structure='identity' keeps no curvature; choose another structure")
        if not self._running.layers:
            raise RuntimeError("there is no curvature before the first step; take one")
        if not self._running.elsewhere:
            return assemble(self._running.blocks(), self._parameters)
        assert self._place.shards is not None
        own = self._running.blocks()
        layers = self._place.shards.world.gather(list(own), "the layers of the curvature")
        operators = self._place.shards.world.exchanged([dump(op) for op in own.values()], "the curvature")
        blocks = {
            layer: restore(op)
            for its, ops in zip(layers, operators, strict=True)
            for layer, op in zip(its, ops, strict=True)
        }
        return assemble(blocks, self._parameters)

    def _own_blocks(self) -> dict[str, Block]:
        """Of the layers whose averages are here."""
        return named_blocks(self._running.blocks(), self._parameters)

    def _scale(self) -> float:
        if not self._running.reads_gradients:
            return 1.0  # the damping is relative
        operators = [block.operator for block in self._own_blocks().values()]
        traces = torch.stack([op.trace_in_coordinates() for op in operators]).tolist() if operators else []
        means = [(trace / op.space.size, float(op.space.size)) for trace, op in zip(traces, operators, strict=True)]
        if self._is_spread:
            means = [mean for own in self._shards.world.gather(means, "the traces of the curvature") for mean in own]
        return weighted_median(means)

    # Saving --------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {
            "structure": self.structure,
            "running": self._running.state(),
            "inverse": None
            if self._inverse is None
            else {json.dumps([name, *block.names]): dump(block) for name, block in self._inverse.items()},
            "owners": _listed(self._owners),
            "inverse_age": self._inverse_age,
            "bases_age": self._bases_age,
            "last_statistics": self._last_statistics,
            "spoiled": self._spoiled,
        }

    def _load_own_state(self, saved: dict[str, Any]) -> None:
        self._running.load(saved["running"])
        self._inverse_age, self._owners = saved["inverse_age"], {tuple(names): rank for names, rank in saved["owners"]}
        inverse = saved.get("inverse", {})  # a checkpoint has no empty dictionaries
        self._inverse = None if inverse is None else {json.loads(k)[0]: restore(block) for k, block in inverse.items()}
        self._bases_age, self._spoiled = saved["bases_age"], saved["spoiled"]
        self._last_statistics = saved["last_statistics"]

    def _adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        costs: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for key, its in sizes.items():
            costs[Layer.of_key(key).names] += cost(its)
        owners = assign(costs, self._shards.size) if self._place.shards else {}

        def here(key: str) -> bool:
            names = tuple(json.loads(key)[1:]) if key.startswith("[") else Layer.of_key(key).names
            return not self._is_spread or owners[names] == self._shards.rank

        return here, {"owners": _listed(owners)}

    def _check_own_state(self, saved: dict[str, Any]) -> None:
        if saved["structure"] != self.structure:
            raise ValueError(
                f"the state is of structure={saved['structure']!r}, and this optimizer has {self.structure!r}; make it "
                "with the same"
            )
        elsewhere = set(saved["running"]["layers"]) - set(saved["running"].get("moments", {}))
        if elsewhere and not self._is_spread:
            raise ValueError(
                f"the state is one rank's of several and has no moments of {len(elsewhere)} layers; save it with "
                "torch.distributed.checkpoint and load it with natgrad.load_checkpoint"
            )
        for layer in map(Layer.of_key, saved["running"].get("moments", {})):
            unknown = [n for n in layer.names if n not in self._parameters]
            if unknown:
                raise ValueError(
                    f"the state has moments of {unknown[0]!r}, which is not a trainable parameter here; load it "
                    "for the model that it was saved of"
                )
        running = RUNNING[self.structure](self.centered, self.sharing, self.max_dim)
        running.load(saved["running"])
        for layer, op in running.blocks().items():
            shapes = [tuple(self._parameters[n].shape) for n in layer.names]
            if sum(map(prod, shapes)) != op.space.size:
                raise ValueError(
                    f"the state has moments for {layer.names[0]!r} with matrices of {op.space.shapes}; here it has "
                    f"shape {shapes[0]}: load it for a model of the same widths"
                )


def _listed(owners: Mapping[tuple[str, ...], int]) -> list[Any]:
    return [[list(names), rank] for names, rank in owners.items()]
