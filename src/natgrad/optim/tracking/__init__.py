"""Between a forward of the model and the step: which forwards there were, and which losses were made of them."""
