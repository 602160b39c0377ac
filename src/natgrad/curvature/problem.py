"""What a matrix is computed from: a model, a loss, data, and the selected parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.cases import Cases
from natgrad.capture.derivatives import DerivativeRecorder
from natgrad.capture.eager import EAGER, not_compiled
from natgrad.capture.entry import precision_of_models
from natgrad.capture.one_at_a_time import ONE_AT_A_TIME
from natgrad.capture.reading import read_cases
from natgrad.capture.recorder import Recorder
from natgrad.capture.separation import SeparationCheck
from natgrad.capture.use import Use
from natgrad.checks.batches import misfit
from natgrad.checks.parameters import Selection, select_parameters
from natgrad.checks.values import check_count, check_dtype, check_function, check_generator, described
from natgrad.distributed.gathering import apart, in_common, jointly
from natgrad.distributed.placement import unwrapped
from natgrad.losses import output_curvature

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


class Problem:
    """A model, a loss and data: batch after batch as `(output, target)`, or as the cases of every layer.

    Iterating gives the batches unchanged. The arguments are those of `natgrad.fisher`. With `reached`, there are cases
    only for layers that the output depends on, possibly for none. For a model in `DistributedDataParallel`, the batches
    are those of this rank, possibly none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        data: Any,
        kind: str = "fisher",
        estimator: str = "exact",
        samples: int = 1,
        params: Selection = None,
        forward: Forward | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        reached: bool = False,
    ):
        self.reached = reached
        self.curvature = output_curvature(loss, kind)
        self.curvature.check_estimator(estimator)
        check_count("samples", samples)
        check_dtype(dtype)
        if dtype is not None and torch.promote_types(dtype, torch.float32) != dtype:
            raise ValueError(
                f"dtype={dtype} is too imprecise to sum many batches; expected torch.float32 or torch.float64"
            )
        check_function("forward", forward, "of the model and a batch that returns (output, target)")
        self.model, self.world = unwrapped(model)
        self.kind, self.estimator, self.samples = kind, estimator, samples
        self.parameters = select_parameters(self.model, params)
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = dtype or torch.promote_types(first.dtype, torch.float32), first.device
        check_generator(generator, self.device)
        self.generator = in_common(self.world, generator, self.device)
        draws = estimator == "mc" or self.world.size == 1
        self._labels = apart(self.world, self.generator, self.device) if draws else None
        self._held: Tensor | None = None  # the state of the held labels
        self.separation = SeparationCheck()
        self._derives = False  # whether the forward takes derivatives of layers
        self._forward, self.progress = forward, progress and self.world.rank == 0
        self.precision = precision_of_models(self.device)
        if _is_one_batch(data, forward is not None):
            data = [data]
        if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
            raise ValueError(f"data is {described(data)}; expected an (input, target) pair or an iterable of them")
        # An iterator can be read once only, and an implicit matrix reads the data at every product.
        self._data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data

    def __iter__(self) -> Iterator[Any]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "nothing can be differentiated inside torch.inference_mode(); expected a call outside of it, or "
                "torch.no_grad() in its place"
            )
        data: Iterable[Any] = self._data
        if self.progress:
            from rich.progress import track

            total = len(self._data) if isinstance(self._data, Sized) else None
            data = track(self._data, description="curvature", total=total, transient=True)
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty and self.world.size == 1:
            raise ValueError(
                "data is empty: expected at least one (input, target) batch. A generator or iterator that was read "
                "before is empty, too: make a new one, or give a list"
            )

    @not_compiled
    def run(self, model: Any, batch: Any) -> tuple[Tensor, Any]:
        """The model's output on a batch, in the precision (autocast) that was active when the matrix was requested. The
        model's buffers, such as the running averages of batch normalization, do not change."""
        # Autocast keeps cast parameters, which may have changed since. Compiled code has no tangents and no function
        # modes.
        torch.clear_autocast_cache()
        lowered = torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not None, cache_enabled=False
        )
        with EAGER, lowered, buffers_kept(self.model), without_cudnn(self.model):
            try:
                return self._run(model, batch)
            except RuntimeError as error:
                clearer = misfit(error, batch, next(iter(self.parameters.values())))
                if clearer is None:
                    raise
                raise clearer from error

    def evaluated(self, batch: Any) -> tuple[Tensor, Any]:
        """The output without a graph, and the target."""
        try:
            with torch.no_grad():
                return self.run(self.model, batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        with torch.enable_grad():  # the forward takes derivatives itself
            output, target = self.run(self.model, batch)
        return output.detach(), target

    def _run(self, model: Any, batch: Any) -> tuple[Tensor, Any]:
        if self._forward is not None:
            result = self._forward(model, batch)
            if not (isinstance(result, (tuple, list)) and len(result) == 2):
                raise ValueError(f"forward returned {described(result)}; expected a pair (output, target)")
            output, target = result
        else:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(
                    f"a batch is {described(batch)}; expected an (input, target) pair. For batches of another form "
                    "pass forward=lambda model, batch: (output, target)"
                )
            output, target = model(batch[0]), batch[1]
        output = self.curvature.join(output)
        if output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()
        self._check(output, target)
        if output.numel() == 0:
            raise ValueError(f"a batch is empty: the output has shape {tuple(output.shape)}; leave empty batches out")
        return output, target

    def _check(self, output: Tensor, target: Any) -> None:
        self.curvature.check(output, target)

    def columns(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        """The columns of `S` on one batch, by the chosen estimator."""
        return self.curvature.columns(output, target, self.estimator, self.samples, self._labels)

    def hold_labels(self) -> None:
        """From here on, `same_labels` makes each pass draw the same random labels."""
        if self.estimator != "mc":
            return  # there are none, and the user's random numbers stay
        source, own = self.labels(), torch.Generator(self.device)
        own.set_state(source.get_state())
        torch.rand((), generator=source, device=self.device)  # another matrix draws others
        self._labels, self._held = own, own.get_state()

    def same_labels(self) -> None:
        """Rewinds to the first of the held labels."""
        if self._held is not None:
            self.labels().set_state(self._held)

    def signed_columns(self, output: Tensor, target: Any) -> Iterator[tuple[int, Tensor]]:
        """The columns with their signs, which are all positive unless `D` is indefinite."""
        if self.estimator == "exact":
            return self.curvature.signed_columns(output.detach(), target)
        return ((1, column) for column in self.columns(output, target))

    def recorded(
        self, parameters: Mapping[str, Tensor], batches: Iterable[Any] | None = None
    ) -> Iterator[tuple[Recorder, Tensor, Tensor]]:
        """Each batch's output and target, with the recorded uses of the given parameters; of the data, or of the given
        batches of it."""
        for batch in self if batches is None else batches:
            recorder = Recorder(parameters)
            yield recorder, *self._record(recorder, batch)

    @not_compiled
    def _record(self, recorder: Recorder, batch: Any) -> tuple[Tensor, Any]:
        with torch.enable_grad(), recorder:
            output, target = self.run(self.model, batch)
        check_output(output)
        if not output.requires_grad and not self.reached:
            raise ValueError("the output does not depend on any trainable parameter; expected a model that uses them")
        return output, target

    def _uses(self, batch: Any) -> tuple[list[Use], Tensor, Any]:
        """The uses of the parameters, also within derivatives that the forward takes itself; output and target."""
        if not self._derives:
            recorder = Recorder(self.parameters)
            output, target = self._record(recorder, batch)
            try:
                return recorder.check(output, reached=self.reached), output, target
            except NotImplementedError:
                if not recorder.takes_derivatives:
                    raise
        recorder = DerivativeRecorder(self.parameters)
        output, target = self._record(recorder, batch)
        uses = recorder.check(output, reached=self.reached or recorder.takes_derivatives)
        self._derives = recorder.takes_derivatives
        return uses, output, target

    def cases(self) -> Iterator[Cases]:
        """The cases of every layer, batch after batch."""
        for batch in self:
            uses, output, target = self._uses(batch)
            if self.reached and not uses:
                continue
            for use in uses:
                use.forget_output()
            mass = self.curvature.normalizer(output, target)
            mode = tuple(module.training for module in self.model.modules())
            yield read_cases(
                uses,
                output,
                partial(self.columns, output, target),
                mass,
                self.dtype,
                separation=self.separation.of(uses, output, mode).whole(),
                ignored=self.curvature.ignored(output, target),
                sampled=self.estimator == "mc",
            )

    def labels(self) -> torch.Generator:
        """The source of random labels, which can be rewound from now on."""
        if self._labels is None:
            seed = int(torch.randint(2**62, ())) if self.estimator == "mc" else 0  # nothing is drawn
            self._labels = torch.Generator(self.device).manual_seed(seed)
        return self._labels

    def mass(self) -> Tensor:
        """The divisor of a mean over all data and all ranks."""
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        with jointly(self.world, "the losses' normalizers"):
            for batch in self:
                total += self.curvature.normalizer(*self.evaluated(batch))
        return self.world.sum(total, "the losses' normalizers")

    @property
    def is_mean(self) -> bool:
        """Whether the objective is a mean over the data. The sums over cases are then divided by `mass`."""
        return self.curvature.is_mean

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the matrix, from the data seen so far."""
        return self.curvature.notes

    def passes(self, count: int, between: Callable[[], None]) -> Iterator[Cases]:
        """The cases in `count` passes, with the same random labels in each. Only one batch is kept in memory."""
        if count == 1:
            yield from self.cases()
            return
        labels = self.labels()
        state = labels.get_state()
        single = isinstance(self._data, Sized) and len(self._data) == 1
        kept = [cases.kept() for cases in self.cases()] if single else None
        for i in range(count):
            if i:
                between()
                labels.set_state(state)
            yield from kept if kept is not None else self.cases()


def _is_one_batch(data: Any, has_forward: bool) -> bool:
    """Whether the data are one batch: a tuple of tensors, or a list of two tensors if batches have to be pairs.

    Raises:
        ValueError: for a list of two tensors with a `forward`, if it may be one batch or two.
    """
    if not isinstance(data, (tuple, list)) or not data or not isinstance(data[0], Tensor):
        return False
    if isinstance(data, tuple):
        return True
    if len(data) != 2 or not isinstance(data[1], Tensor):
        return False
    if has_forward and (data[0].dtype, data[0].ndim) != (data[1].dtype, data[1].ndim):
        raise ValueError(
            f"data is a list of two tensors of different kinds, {data[0].dtype} of shape {tuple(data[0].shape)} and "
            f"{data[1].dtype} of shape {tuple(data[1].shape)}; with forward= a list is one of batches and a tuple is "
            "one batch: expected (a, b) for one, or batches of one kind"
        )
    return not has_forward


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Within this context, the model writes to copies of its buffers."""
    own = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies = {id(b): b.clone() for _, _, b in own}
    for m, name, b in own:
        m._buffers[name] = copies[id(b)]
    try:
        yield
    finally:
        for m, name, b in own:
            m._buffers[name] = b


@contextlib.contextmanager
def without_cudnn(model: nn.Module) -> Iterator[None]:
    """Within this context, recurrent networks on a GPU use torch's own code, not cuDNN. cuDNN cannot compute their
    gradients in evaluation mode, for many outputs at once, or twice."""
    if not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield
        return
    with ONE_AT_A_TIME, torch.backends.cudnn.flags(enabled=False):
        yield


def check_output(output: Tensor) -> None:
    """Raises ValueError if the output has entries that are not finite."""
    if not torch.isfinite(output).all():
        bad = int((~torch.isfinite(output)).sum())
        raise ValueError(
            f"{bad} of {output.numel()} entries of the model's output are not finite; look for NaN or inf in the "
            "batch or in the parameters"
        )


def check_mass(mass: Tensor, is_mean: bool) -> None:
    """Raises ValueError if the divisor of the mean is zero or not finite."""
    if is_mean and not torch.isfinite(mass):
        raise ValueError(f"the loss's mean divides by {float(mass):g}; look for NaN or inf in its class weights")
    if is_mean and not mass > 0:
        raise ValueError(
            f"the loss's mean divides by {float(mass):g}: every target is ignored or has weight zero; "
            "leave such data out, or use reduction='sum'"
        )
