"""Step rules and damping rules: how long a step is, and how the damping changes."""
