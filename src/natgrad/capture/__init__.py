"""From a model's forward to cases: which parameter was used how, and what each layer's inputs and gradients are."""
