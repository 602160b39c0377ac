"""Hugging Face: a `Trainer` whose loss is the optimizer's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from natgrad.integrations.diagnostics import scalars
from natgrad.losses import OutputCurvature
from natgrad.optim.optimizer import CurvatureOptimizer

Read = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""What the loss takes, output and target, from what the model returned and the labels."""


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for `natgrad.KFAC` and `natgrad.NaturalGradient`.

        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        Trainer(model, args, train_dataset=data, optimizers=(opt, None))

    The loss is the optimizer's, on the model's `logits` and the batch's `labels`, of which -100 is left out; models for
    causal language modelling are asked for the next token. Microbatches and ranks count by their labels, as in
    `transformers`. What a step did is logged with the loss.

    Where `lr` is None, as is the default, the arguments must say `lr_scheduler_type="constant"`, and the learning rate
    that is logged is the step size that was taken. `max_grad_norm`, 1 by default, clips as always: the step becomes
    shorter by as much as the gradient. Set it to 0, with KFAC's `max_kl` in its place, for the full step.

    Args:
        read: `read(returned, labels)` gives the loss's input and target, for a model or a loss that needs another way.
        model, args, optimizers: and all else, as for `transformers.Trainer`.

    Raises:
        TypeError: if `optimizers` has no optimizer of natgrad that follows a loss.
        ValueError: if the arguments ask for label smoothing, which belongs in the optimizer's loss, or for
            `DataParallel`; by `train`, if they have a scheduler of a step size that is adapted.

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
        read: Read | None = None,
        **kwargs: Any,
    ):
        opt = optimizers[0]
        if not isinstance(opt, CurvatureOptimizer):
            raise TypeError(
                f"optimizers has a {type(opt).__name__} for its optimizer; expected "
                "(natgrad.KFAC(model, nn.CrossEntropyLoss()), None), or a natgrad.NaturalGradient"
            )
        self.following = opt
        self._read = read or self._next_or_same
        super().__init__(model, args, optimizers=optimizers, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} is not the optimizer's loss; give that "
                "one: natgrad.KFAC(model, nn.CrossEntropyLoss(label_smoothing=...))"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={self.args.n_gpu} in one process is DataParallel, whose copies of the model are not followed; "
                "run one process for each, by torchrun"
            )
        # Whether it counts the labels of all microbatches, and leaves it to `compute_loss` to divide by them.
        self.model_accepts_loss_kwargs = read is None
        self._loss_shifts_labels = self._is_causal()  # and the first of a row is none of them

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`opt.loss` in training, the loss itself in evaluation; with a share of all microbatches' labels."""
        if "labels" not in inputs:
            raise ValueError(f"the batch has {', '.join(inputs)} and no labels; let the collator make them")
        if isinstance(model, DistributedDataParallel):
            self.following.tracker.see_ranks(model)  # before its first forward, whose output it copies
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        output, target = self._read(outputs, inputs["labels"])
        trains = model.training and torch.is_grad_enabled()
        curvature = self._curvature
        loss = self.following.loss(output, target) if trains else curvature.loss(output, target)
        if num_items_in_batch is not None and (trains or not curvature.is_mean):
            loss = loss * self._share(output, target, float(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    @property
    def _curvature(self) -> OutputCurvature:
        """That of the optimizer's loss."""
        (term,) = self.following.tracker.terms.values()
        return term.curvature

    def _share(self, output: Tensor, target: Tensor, items: float) -> Any:
        """The factor by which microbatches and ranks add up to the mean over their labels."""
        curvature, ranks = self._curvature, self.following.parameters.place.world.size
        if not curvature.is_mean:  # torch averages over the ranks
            return (ranks if self.args.average_tokens_across_devices else 1) / items
        if ranks > 1:  # the optimizer counts the cases itself
            return 1 / self.current_gradient_accumulation_steps
        return curvature.normalizer(output.detach(), target) / items

    def _next_or_same(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if labels.is_floating_point():
            return logits.reshape(labels.shape), labels
        if self._is_causal():
            labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return logits.movedim(-1, 1), labels

    def _is_causal(self) -> bool:
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of adapters
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """That of the arguments, for a step size that is a number; else one that reports the step size taken.

        Raises:
            ValueError: if `lr` is None and the arguments have any but the constant one.
        """
        if self.lr_scheduler is not None or self.following.param_groups[0]["lr"] is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        kind = transformers.SchedulerType(self.args.lr_scheduler_type)
        if kind != transformers.SchedulerType.CONSTANT:
            raise ValueError(
                f"lr_scheduler_type={kind.value!r} is to change lr, which is None here: it is adapted at every step. "
                "Give TrainingArguments(lr_scheduler_type='constant'), or numbers for lr and momentum to "
                f"{type(self.following).__name__}"
            )
        self.lr_scheduler = Adapted(self.following)  # type: ignore[assignment]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the figures of the last step, where there is a loss of one."""
        if "loss" in logs:
            logs |= scalars(self.following.diagnostics)
        super().log(logs, *args, **kwargs)


class Adapted:
    """In a scheduler's place where the optimizer adapts its step size: the last one taken."""

    def __init__(self, opt: CurvatureOptimizer):
        self._opt = opt

    def step(self) -> None:
        """Nothing is to be done."""

    def get_last_lr(self) -> list[float]:
        return [self._opt.diagnostics.get("lr", 0.0)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is none."""
