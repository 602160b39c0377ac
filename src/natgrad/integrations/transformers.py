"""Hugging Face's `Trainer`, with the loss of the optimizer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from natgrad.checks.values import check_choice
from natgrad.integrations.diagnostics import scalars
from natgrad.integrations.meant import BY_NAME, LABELS, Meaning, Meanings, Read
from natgrad.losses import OutputCurvature
from natgrad.losses.own import Candidate
from natgrad.losses.reading import NEXT, SAME, Given
from natgrad.optim.optimizer import CurvatureOptimizer


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for `natgrad.KFAC` and `natgrad.NaturalGradient`.

        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        Trainer(model, args, train_dataset=data, optimizers=(opt, None))

    The loss is the optimizer's, applied to the model's `logits` and the batch's `labels`; labels of -100 are left out.
    The trainer finds out from the model's own loss whether a label belongs to the logits at its own position or at the
    position before. On the first batch of each kind it compares the two losses by value and by gradient, and raises an
    error if they differ. With `natgrad.KFAC(model, "model")` the model's own loss is minimized directly. Microbatches
    and ranks are weighted by their numbers of labels, as in `transformers`. The diagnostics of a step are logged with
    the loss.

    If `lr` is None, which is the default, the arguments need `lr_scheduler_type="constant"`. The logged learning rate
    is then the step size that was taken. `max_grad_norm` is 1 by default and clips as usual: the step becomes shorter
    by the same factor as the gradient. For the full step, set it to 0. KFAC's `max_kl` can bound the step instead.

    Args:
        read: None; or, if the optimizer's loss is not the model's own, `"same"` (each label belongs to the logits at
            its own position), `"next"` (to those at the position before), or a function: `read(returned, labels)`
            returns the loss's input and target. Then the losses are not compared.
        model, args, optimizers: as for `transformers.Trainer`, like all other arguments.

    Raises:
        TypeError: if `optimizers` does not contain one of these optimizers.
        ValueError: if the arguments ask for label smoothing that the optimizer's loss does not have, or for
            `DataParallel`; by `train` and `evaluate`, if the optimizer's loss differs from the model's own or from
            `compute_loss_func`; by `train`, if the arguments have a scheduler but the step size is adaptive.

    Example:
        >>> import tempfile, torch, natgrad, transformers
        >>> from natgrad.integrations.transformers import Trainer
        >>> _ = torch.manual_seed(0)
        >>> config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(20, (32, 8))]
        >>> opt = natgrad.KFAC(model, torch.nn.CrossEntropyLoss())
        >>> args = transformers.TrainingArguments(tempfile.mkdtemp(), lr_scheduler_type="constant", use_cpu=True)
        >>> trainer = Trainer(model, args, train_dataset=data, optimizers=(opt, None))
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments | None = None,
        *,
        optimizers: tuple[Any, Any] = (None, None),
        read: Read | str | None = None,
        **kwargs: Any,
    ):
        opt = optimizers[0]
        if not isinstance(opt, CurvatureOptimizer):
            raise TypeError(
                f"optimizers has a {type(opt).__name__} for its optimizer; expected "
                "(natgrad.KFAC(model, nn.CrossEntropyLoss()), None), or a natgrad.NaturalGradient"
            )
        if read is not None and not callable(read):
            check_choice("read", read, tuple(BY_NAME))
        self.following, self._read = opt, read
        super().__init__(model, args, optimizers=optimizers, **kwargs)
        self._check_arguments()
        if self._trains_own:
            return
        # Whether the trainer counts the labels of all microbatches, for `compute_loss` to divide by.
        self.model_accepts_loss_kwargs = not callable(read)
        self._loss_that_is_meant, self.compute_loss_func = self.compute_loss_func, None
        if self.args.label_names is None and "labels" in self.label_names:
            self.label_names = ["labels"]  # labels of other heads are not needed

    def _check_arguments(self) -> None:
        """Raises ValueError for options that the optimizer's loss does not have, and for `DataParallel`."""
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        if self._trains_own and (smoothing or self.compute_loss_func is not None or self._read is not None):
            what = f"label_smoothing_factor={smoothing}" if smoothing else "read" if self._read else "compute_loss_func"
            raise ValueError(
                f'{what} makes another loss than the model\'s own, which the optimizer was made for by "model"; give '
                "it the loss itself: natgrad.KFAC(model, nn.CrossEntropyLoss(label_smoothing=...))"
            )
        its = None if self._trains_own else getattr(self._curvature.module, "label_smoothing", 0.0)
        if smoothing and its != smoothing:
            raise ValueError(
                f"label_smoothing_factor={smoothing} is not the optimizer's loss, which has {its}; give that one: "
                f"natgrad.KFAC(model, nn.CrossEntropyLoss(label_smoothing={smoothing}))"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={self.args.n_gpu} in one process is DataParallel, whose copies of the model are not followed; "
                "run one process for each, by torchrun"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`opt.loss` in training, the loss itself in evaluation, times the batch's share of the labels of all
        microbatches."""
        if isinstance(model, DistributedDataParallel):
            self.following.tracker.see_ranks(model)  # before its first forward, whose output it copies
        if self._trains_own:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        meaning, curvature = self._meaning(inputs), self._curvature
        outputs = model(**meaning.arguments(inputs))
        output, target = self._pair(meaning, outputs, inputs)
        trains = model.training and torch.is_grad_enabled()
        if trains:
            (term,) = self.following.tracker.terms.values()
            loss = self.following.tracker.loss(
                term, output, target, lambda again: self._pair(meaning, again, inputs)[0]
            )
        else:
            loss = curvature.loss(output, target)
        if num_items_in_batch is not None and (trains or not curvature.is_mean):
            loss = loss * self._share(output, target, float(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    @property
    def _trains_own(self) -> bool:
        """Whether the model's own loss is trained."""
        return self.following.tracker.own is not None

    @property
    def _curvature(self) -> OutputCurvature:
        """The curvature of the optimizer's loss."""
        (term,) = self.following.tracker.terms.values()
        return term.curvature

    @cached_property
    def _meanings(self) -> Meanings:
        read = SAME if callable(self._read) else BY_NAME.get(self._read or "")
        sharded = self.following.parameters.place.shards is not None
        return Meanings(self._curvature, read, self._loss_that_is_meant, sharded)

    def _meaning(self, inputs: Given) -> Meaning:
        """How a batch is read."""
        if "labels" not in inputs and (callable(self._read) or not all(n in inputs for n in LABELS[1:])):
            raise ValueError(f"the batch has {', '.join(inputs)} and no labels; let the collator make them")
        with self.following.tracker.watch.suspended(), self.compute_loss_context_manager():
            return self._meanings.of(self.accelerator.unwrap_model(self.model), inputs)

    def _pair(self, meaning: Meaning, outputs: Any, inputs: Given) -> tuple[Tensor, Tensor]:
        """The loss's input and target."""
        if callable(self._read):
            return self._read(outputs, inputs["labels"])
        return Candidate(meaning.reading, self._curvature).read(outputs, inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The divisor of the mean over all microbatches and ranks; None if it depends on the logits."""
        if self._trains_own or callable(self._read):
            return super()._get_num_items_in_batch(batch_samples, device)
        masses = []
        for inputs in map(self._prepare_inputs, batch_samples):
            masses.append(self._meanings.mass(self._meaning(inputs).reading, inputs))
        known = [m for m in masses if m is not None]
        if not known or len(known) < len(masses):
            return None
        items = torch.stack([m.to(device, torch.float64) for m in known]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items

    def _share(self, output: Tensor, target: Tensor, items: float) -> Any:
        """The factor with which the losses of microbatches and ranks add up to the mean over their labels."""
        curvature, ranks = self._curvature, self.following.parameters.place.world.size
        if not curvature.is_mean:  # torch averages over the ranks
            return (ranks if self.args.average_tokens_across_devices else 1) / items
        if ranks > 1:  # the optimizer counts the cases itself
            return 1 / self.current_gradient_accumulation_steps
        return curvature.normalizer(output.detach(), target) / items

    def _is_causal(self) -> bool:
        """Whether a label belongs to the logits of the position before, in a batch seen so far."""
        return any(meaning.reading.words.startswith(NEXT.words) for meaning in self._meanings.known)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of the arguments; or, if `lr` is None, one that only reports the step size that was used.

        Raises:
            ValueError: if `lr` is None and the arguments have another scheduler than the constant one.
        """
        if self.lr_scheduler is not None or self.following.param_groups[0]["lr"] is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        kind = transformers.SchedulerType(self.args.lr_scheduler_type)
        if kind != transformers.SchedulerType.CONSTANT:
            raise ValueError(
                f"lr_scheduler_type={kind.value!r} cannot change lr, because lr is None: it is adapted at every step. "
                "Give TrainingArguments(lr_scheduler_type='constant'), or numbers for lr and momentum to "
                f"{type(self.following).__name__}"
            )
        self.lr_scheduler = Adapted(self.following)  # type: ignore[assignment]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs also the diagnostics of the last step, if its loss is logged."""
        if "loss" in logs:
            logs |= scalars(self.following.diagnostics)
        super().log(logs, *args, **kwargs)


class Adapted:
    """Takes the place of a scheduler if the step size is adaptive: reports the last step size."""

    def __init__(self, opt: CurvatureOptimizer):
        self._opt = opt

    def step(self) -> None:
        """Does nothing."""

    def get_last_lr(self) -> list[float]:
        return [self._opt.diagnostics.get("lr", 0.0)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: there is no state."""
