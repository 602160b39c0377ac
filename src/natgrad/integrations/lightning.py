"""Lightning: a callback that logs diagnostics. The trainer itself needs no changes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from natgrad.integrations.diagnostics import DiagnosticsWriter, scalars


class LogDiagnostics(pl.Callback):
    """A callback that sends `opt.diagnostics` to the trainer's loggers every `log_every_n_steps` steps, and whenever a
    step was rejected, with the reason.

        Trainer(callbacks=[LogDiagnostics()])

    Use it instead of `LearningRateMonitor`, which has no number to show if `lr` is adaptive: `natgrad/lr` is the step
    size that was taken. Loggers get numbers. Those with a TensorBoard writer also get texts.

    Args:
        prefix: what the names begin with. If there are several optimizers, the number of the optimizer follows.

    Example:
        >>> import torch, natgrad, lightning.pytorch as pl
        >>> from natgrad.integrations.lightning import LogDiagnostics
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        ...     def configure_optimizers(self):
        ...         return natgrad.KFAC(self.net, torch.nn.CrossEntropyLoss())
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return self.optimizers().loss(self.net(x), y)
        >>> model, callback = Classifier(), LogDiagnostics()
    """

    def __init__(self, prefix: str = "natgrad"):
        self.prefix = prefix
        self._seen: dict[int, int] = {}
        self._writers: dict[tuple[int, int], DiagnosticsWriter] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen.clear()
        self._writers.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        several = len(trainer.optimizers) > 1
        for i, opt in enumerate(trainer.optimizers):
            diagnostics = getattr(opt, "diagnostics", None)
            if not diagnostics or self._seen.get(i) == diagnostics["step"]:
                continue  # not natgrad's, or in the middle of an accumulation
            self._seen[i] = diagnostics["step"]
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if trainer.global_step % every == 0 or not diagnostics["accepted"]:
                self._log(trainer, i, opt, f"{self.prefix}/{i}" if several else self.prefix)

    def _log(self, trainer: pl.Trainer, i: int, opt: Optimizer, prefix: str) -> None:
        diagnostics: dict[str, Any] = opt.diagnostics  # type: ignore[attr-defined]
        for k, logger in enumerate(trainer.loggers):
            writer = getattr(logger, "experiment", None)
            if hasattr(writer, "add_scalar") and hasattr(writer, "add_text"):
                own = self._writers.setdefault((k, i), DiagnosticsWriter(writer, prefix))
                own.write(diagnostics, trainer.global_step)
            else:
                logger.log_metrics(scalars(diagnostics, prefix), step=trainer.global_step)
