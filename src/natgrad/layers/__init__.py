"""How each kind of use becomes cases; from there on every layer is linear."""
