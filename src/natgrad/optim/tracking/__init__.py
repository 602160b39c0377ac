"""What happens between the model's forward and the step: which forwards ran, and which losses were computed."""
