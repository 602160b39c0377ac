"""What turns a gradient into a direction: `(F + λI)⁻¹ ∇`, one file for each kind of `F` and of where it is."""
