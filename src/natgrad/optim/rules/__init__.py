"""How long a step is, and how the damping moves."""
