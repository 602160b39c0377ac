"""What is drawn or printed: pictures, tables for notebooks, the report of the residual."""
