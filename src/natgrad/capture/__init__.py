"""From a model's forward pass to cases: how each parameter is used, and the inputs and gradients of each layer."""
