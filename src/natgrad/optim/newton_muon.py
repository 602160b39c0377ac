"""NewtonMuon: orthogonalized steps on whitened inputs for hidden matrices, AdamW steps for all other parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.eager import not_compiled
from natgrad.checks.parameters import check_parameters, select_parameters
from natgrad.checks.values import (
    check_choice,
    check_count,
    check_max_dim,
    check_number,
    check_within,
)
from natgrad.checks.warning import warn
from natgrad.curvature.moments import MAX_DIM
from natgrad.distributed.placement import placed
from natgrad.distributed.whole import Whole
from natgrad.optim import averaging, saved
from natgrad.optim.muon.adamw import adamw, decayed_
from natgrad.optim.muon.forwards import Forwards
from natgrad.optim.muon.matrices import Matrices
from natgrad.optim.muon.momentum import momentum
from natgrad.optim.muon.output import OutputSide
from natgrad.optim.muon.routing import Routing, Steps, chooser, named
from natgrad.optim.muon.schedule import Schedule
from natgrad.optim.muon.settings import REST, SIDES, check_group, share_of_lr
from natgrad.optim.muon.whitening import InputSide
from natgrad.optim.parameter_groups import Groups, as_group, parameter_groups
from natgrad.optim.parameters import Parameters
from natgrad.optim.tracking.unchanged import Unchanged
from natgrad.optim.vectors import Vector, check_dense


class NewtonMuon(torch.optim.Optimizer):
    """Whitened, orthogonalized steps for hidden matrices, and AdamW steps for all other parameters. It needs no loss
    and no change to the training loop.

    A hidden matrix with gradient `∇` and inputs `h` moves by

        `W ← (1 − α η) W − α 0.2 √max(d_out, d_in) orth(M (A / ā + ρ D^½)⁻¹)`

    with `M` the momentum of `∇`, `A` the average of `h hᵀ` over the layer's inputs, `ā` the mean of its eigenvalues,
    `D` the diagonal of `A / ā`, `ρ` the ridge, `α` the learning rate and `η` the weight decay. `orth` sets all singular
    values to about one, by five Newton-Schulz iterations. The factor `0.2 √max` makes the step as long as a step of
    AdamW. Without `A` this is Muon. With `sides="both"` the output side is whitened, too:
    `orth((B / b̄ + ρ I)⁻¹ M (A / ā + ρ D^½)⁻¹)`, with `B` the average of `∇ A⁻¹ ∇ᵀ`.

    The first forward pass in training mode shows which parameters are hidden matrices: weights that multiply
    inputs, and whose output is an input of another matrix. A convolution kernel is a matrix over patches. The gates
    of an LSTM count as four matrices. Query, key and value in one weight are as many matrices as parts of the
    weight that the forward uses: one in self-attention, two in cross-attention. Output layers, embeddings, norms,
    scales and biases get AdamW steps, with the learning rate `rest_lr`. `routing()` shows the choice, and `steps`
    overrides it.

    The inputs are recorded in forward passes of `model` in training mode with gradients enabled. On several ranks, make
    the optimizer for the `DistributedDataParallel` or `fully_shard` model. Every rank then takes the same step.

    Args:
        model: the network.
        lr: learning rate of hidden matrices. Schedulers change `rest_lr` in proportion.
        params: the parameters to train: names, a predicate on names, groups of them, or torch's groups. None: all. A
            group may have its own `lr`, `rest_lr`, `weight_decay`, `rest_weight_decay`, `cautious`, `momentum`,
            `nesterov`, `betas` and `eps`.
        rest_lr: learning rate of the AdamW steps. None: half of `lr`.
        weight_decay: decoupled weight decay: each step multiplies hidden matrices by `1 − lr weight_decay`.
        rest_weight_decay: that of all other parameters, which are multiplied by `1 − rest_lr rest_weight_decay`. None:
            as `weight_decay`. Language models usually train with 0 here.
        cautious: decay only the entries that the step moves towards zero (Chen et al. 2025, arXiv:2510.12402).
        momentum: momentum of hidden matrices. That of torch's Muon is 0.95.
        nesterov: whether to use Nesterov momentum.
        betas: the betas of the AdamW steps.
        eps: the epsilon of the AdamW steps.
        sides: `"input"`, `"both"`, or `"none"`: without whitening, which is Muon.
        ridge: `ρ`. With a large ridge, the whitening only divides each input by its root mean square.
        refresh_every: steps between two updates of `A` and of its inverse. At the start there are fewer steps between
            updates. A matrix that a step does not use is updated the next time that it is used.
        rows_per_input: an update uses a random sample of a batch's rows: so many for each column of the matrix, and at
            least 4,096. None: all rows. Several ranks then take the same step as one process that sees the whole batch.
        decay: the weight of earlier inputs is multiplied by this at each update.
        average: decay of an average of the parameters over the steps, for `averaged()`. None: no average.
        steps: the step of parameters by name, `"whitened"`, `"orthogonal"` or `"adamw"`: a dictionary whose keys may be
            patterns such as `"blocks.*.out.weight"`, or a function of the name. None: chosen by how each parameter is
            used.
        max_dim: for matrices with more columns than this, only the diagonal of `A` is kept. For matrices with more rows
            than this, only the diagonal of `B` is kept.

    Raises:
        TypeError, ValueError: if a setting has a wrong type or is out of range, or if `params` or `steps` has a name
            that is not a parameter.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = natgrad.NewtonMuon(model, lr=0.02)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(2, (16,))).backward()
        ...     _ = opt.step()
        >>> {name: route.step for name, route in opt.routing().items()}
        {'0.weight': 'whitened', '0.bias': 'adamw', '2.weight': 'adamw', '2.bias': 'adamw'}

    Reference: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks"; Liu et al. (2025), "Muon
    is Scalable for LLM Training", arXiv:2502.16982, for the length of the step; Lin et al. (2025), arXiv:2509.03378,
    for the output side.
    """

    _key = "newton_muon"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        *,
        params: Groups = None,
        rest_lr: float | None = None,
        weight_decay: float = 0.1,
        rest_weight_decay: float | None = None,
        cautious: bool = False,
        momentum: float = 0.9,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        sides: str = "input",
        ridge: float = 0.2,
        refresh_every: int = 8,
        rows_per_input: int | None = 4,
        decay: float = 0.8,
        average: float | None = None,
        steps: Steps = None,
        max_dim: int = MAX_DIM,
    ):
        check_choice("sides", sides, SIDES, meanings=SIDES)
        check_number("ridge", ridge, positive=True)
        check_count("refresh_every", refresh_every, "steps")
        if rows_per_input is not None:
            check_count("rows_per_input", rows_per_input, "rows")
        check_within("decay", decay, "[0, 1)")
        check_within("average", average, "[0, 1)", optional=True)
        check_max_dim(max_dim)
        place = placed(model)
        self.model, self.sides, self.average, self._rest_lr = place.model, sides, average, rest_lr
        defaults = {
            "lr": lr,
            "rest": REST if rest_lr is None else share_of_lr(rest_lr, lr),
            "weight_decay": weight_decay,
            "rest_weight_decay": rest_weight_decay,
            "cautious": cautious,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(self._groups(params), defaults)
        self.parameters = Parameters(self, place)
        self.diagnostics: dict[str, Any] = {}
        self._steps = 0
        self._schedule = Schedule(refresh_every)
        chosen = chooser(steps, {n: p.shape for n, p in self.parameters.items()})
        outputs = OutputSide(ridge, decay, max_dim) if sides == "both" else None
        self._matrices = Matrices(self.parameters, chosen, InputSide(ridge, decay), outputs, whiten=sides != "none")
        self._unchanged = Unchanged(self.model, None)
        self._forwards = Forwards(self.parameters, self._wants, max_dim, rows_per_input)
        self._arm()

    # Groups --------------------------------------------------------------------------------------------

    def _groups(self, params: Groups) -> list[dict[str, Any]]:
        """All parameters if none are named. This includes frozen ones, because they may be trained later."""
        if params is not None:
            return parameter_groups(self.model, params)
        select_parameters(self.model)  # raises an error if nothing is trainable
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad or p.is_floating_point()}
        check_parameters(own)
        return [{"params": list(own.values())}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters.

        Raises:
            ValueError: if a parameter is not the model's or is already in a group, or if a setting is out of range.
        """
        group = as_group(self.model, param_group)
        its = group.pop("rest_lr", self._rest_lr if "rest" not in group else None)
        if its is not None:
            group["rest"] = share_of_lr(its, group.get("lr", self.defaults["lr"]))
        super().add_param_group(group)
        try:
            check_group(self.param_groups[-1], self.defaults)
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "parameters"):
            self.parameters.refresh()
            self._forwards.follow()
            self._schedule.begin()
            self._arm()

    def routing(self) -> Routing:
        """The step that each parameter gets, and why: a mapping of names to routes, which prints as a table. It is
        known after the first step.

        Example:
            >>> import torch, natgrad
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
            >>> opt = natgrad.NewtonMuon(model)
            >>> model(torch.randn(16, 4)).sum().backward(); opt.step()
            >>> opt.routing()["0.weight"].step
            'whitened'
        """
        return Routing(self._matrices.routes, self.parameters)

    # The step ------------------------------------------------------------------------------------------

    def _wants(self, name: str) -> bool:
        """Whether the next step uses the inputs of a weight."""
        return self._matrices.may_be_whitened(name) and self._schedule.is_due(name, self._steps)

    def _arm(self) -> None:
        """Before the next forward."""
        names = self._matrices.looked_at()
        self._forwards.settling = not all(map(self._matrices.is_settled, names))
        self._forwards.begin(self._steps, recording=bool(names) and self._schedule.asks(names, self._steps))

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have a gradient. What was done is in `diagnostics`.

        A gradient that is not finite leaves the parameters as they are, and warns.

        Raises:
            RuntimeError: if no forward in training mode has come before.
            ValueError: if a gradient is sparse.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        gradients = self.parameters.gradients()
        check_dense(gradients)
        self.diagnostics = {"step": self._steps, "accepted": True, "reason": "", "refreshed": False}
        recorded = False
        with torch.autocast(self.parameters.device.type, enabled=False):
            if not gradients or self.parameters.finite(gradients):
                g = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in gradients.items()}
                if self._forwards.watch.recording:
                    recorded = self._refresh(g)
                self._move(g)
            else:
                self._reject("the gradient is not finite")
        self.parameters.place.settle()
        self._forwards.watch.buffers.end_step(accepted=self.diagnostics["accepted"])
        used = [n for n in self._matrices.looked_at() if n in gradients]
        self._schedule.end_step(self._steps, used, recorded)
        self._steps += 1
        self._arm()
        return value

    def _reject(self, reason: str) -> None:
        self.diagnostics |= {"accepted": False, "reason": reason}
        self._forwards.take()
        warn(f"{type(self).__name__} rejected step {self._steps}: {reason}")

    def _refresh(self, gradients: Vector) -> bool:
        """Uses what the last forward passes recorded: routes of parameters that had none, and the inputs' moments.
        Gives whether there were any."""
        if self.parameters.place.shards is None:
            self._unchanged.check(self.model, self.parameters)
        shown = self._forwards.take()
        for n in self._matrices.settle(shown, gradients):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.parameters.state_of(n).pop(key, None)
        taken, spoiled = self._matrices.take_in(shown.sums)
        self._matrices.take_in_gradients({n: g for n, g in gradients.items() if self._wants(n)})
        self.diagnostics["refreshed"] = taken
        if spoiled:
            warn(f"the inputs of {named(spoiled)} were not finite at step {self._steps}; earlier averages are kept")
        if shown.changed:
            warn(
                f"the inputs of {named(shown.changed)} were changed in place after their use, and are not counted; "
                "replace the in-place operation by one that returns a new tensor"
            )
        return self.parameters.place.world.numbers([float(shown.forwards)], "who has recorded a forward")[0] > 0

    def _move(self, g: Vector) -> None:
        values, matrices, ahead, directions = self.parameters.local(), self._matrices, Vector(), Vector()
        for group in self.param_groups:
            if "rest_lr" in group:  # changed by the user
                group["rest"] = share_of_lr(group.pop("rest_lr"), group["lr"])
        for group, names in self.parameters.by_group(g):
            states = {n: self.parameters.state_of(n) for n in names}
            hidden, others = ({n: g[n] for n in names if (n in matrices) == which} for which in (True, False))
            ahead |= momentum(hidden, states, group["momentum"], group["nesterov"])
            directions |= adamw(others, states, group["betas"], group["eps"])
        directions |= matrices.directions(ahead)
        for group, names in self.parameters.by_group(g):
            decay, its = group["weight_decay"], group.get("rest_weight_decay")
            for own, rate, eta in (
                ([n for n in names if n in matrices], group["lr"], decay),
                ([n for n in names if n not in matrices], group["lr"] * group["rest"], decay if its is None else its),
            ):
                if own:
                    p, d = [values[n] for n in own], [directions[n].to(values[n].dtype) for n in own]
                    decayed_(p, d, rate * eta, group["cautious"])
                    torch._foreach_add_(p, d, alpha=-rate)
        if self.average is not None:
            averaging.take_in({n: values[n] for n in g}, self.parameters.state_of, self.average)

    # As torch's optimizers -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context, the parameters are their averages over the steps, for evaluation. Afterwards they are
        restored.

        Raises:
            RuntimeError: if the optimizer was made without `average`.
        """
        if self.average is None:
            raise RuntimeError(
                f"there are no averages; make the optimizer with {type(self).__name__}(..., average=0.98)"
            )
        place = self.parameters.place
        try:
            with averaging.swapped(self.parameters.local(), self.parameters.state_of):
                place.settle()
                yield
        finally:
            place.settle()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, apart from the parameters. Training resumes bit for bit.

        As in torch, tensors are not copied.
        """
        own = {"steps": self._steps, "sides": self.sides, **self._schedule.state(), **self._matrices.state()}
        return saved.joined(self, super().state_dict(), own | saved.named(self.parameters))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from the result of `state_dict`, for a model with the same parameters. If an error is raised, nothing
        is changed.

        Raises:
            TypeError: if `state_dict` is not a dictionary.
            ValueError: if it is from another kind of optimizer, or has other parameters.
        """
        own, whole = saved.state_of(state_dict, self._key, type(self).__name__), saved.torchs_own(state_dict, self._key)
        parts = "steps", "refreshed", "waiting", "routes", "owners", "moments", "names", "dtypes"
        missing = [k for k in parts if k not in own]
        if missing:
            raise ValueError(
                f"the state has no {missing[0]!r} under {self._key!r}; expected what state_dict() of this version gives"
            )
        if own.get("sides", self.sides) != self.sides:
            raise ValueError(
                f"the state is of sides={own['sides']!r}, and this optimizer has {self.sides!r}; make it with the same"
            )
        saved.check_parameters(self, self.parameters, own, whole)
        self._matrices.check_state(own)
        place, device, params = self.parameters.place, self.parameters.device, saved.by_index(self)
        # torch casts to the parameter's dtype, which may have a lower precision than the state.
        state = saved.copied({i: _local(place, its) for i, its in whole["state"].items()}, device)
        super().load_state_dict({"state": {}, "param_groups": whole["param_groups"]})
        index = [i for group in whole["param_groups"] for i in group["params"]]
        self.state.update({p: state[i] for i, p in zip(index, params, strict=True) if i in state})
        self.parameters.refresh()
        own = saved.copied(own, device)
        self._steps = own["steps"]
        self._schedule.load(own)
        self._matrices.load(own)
        self._forwards.take()
        self._arm()

    def adopt(self, sizes: Mapping[str, Sequence[torch.Size]]) -> tuple[Callable[[str], bool], dict[str, Any]]:
        """For a state saved on any number of ranks: the matrices whose moments belong here, and what else differs."""
        return self._matrices.adopt(sizes)

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: a copy would not be attached to any model."""
        raise TypeError(
            f"a {type(self).__name__} optimizer cannot be copied or pickled; make one for the new model and load "
            "state_dict()"
        )


def _local(place: Whole, state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: place.local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
