"""Support for training with Lightning, Hugging Face's Trainer, Accelerate and TensorBoard.

`natgrad.integrations.lightning` and `natgrad.integrations.transformers` need the packages of the same names.
"""

from natgrad.integrations.diagnostics import DiagnosticsWriter, scalars, texts

__all__ = ["DiagnosticsWriter", "scalars", "texts"]
