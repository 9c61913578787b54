"""`python -m performers` is `performers`."""

from performers.cli import main

if __name__ == "__main__":
    main()
