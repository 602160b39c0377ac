"""What NewtonMuon is made of: forwards seen, routes, whitening, directions of matrices, AdamW's direction."""
