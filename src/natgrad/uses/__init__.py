"""What curvature is for: uncertainty, influence, pruning, merging, and more, on top of the matrices."""
