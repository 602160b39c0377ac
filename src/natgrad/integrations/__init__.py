"""For who trains with Lightning, Hugging Face's Trainer, Accelerate, TensorBoard: what these need beside the optimizer.

`natgrad.integrations.lightning` and `natgrad.integrations.transformers` need the packages that they are named after.
"""

from natgrad.integrations.diagnostics import DiagnosticsWriter, scalars, texts

__all__ = ["DiagnosticsWriter", "scalars", "texts"]
