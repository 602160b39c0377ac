"""Lets ``python -m natgrad`` do what the command ``natgrad`` does."""

from natgrad.cli import main

if __name__ == "__main__":
    main()
