"""From cases to matrices: moments, bases, structures and exact products."""
