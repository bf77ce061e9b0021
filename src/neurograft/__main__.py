"""`python -m neurograft`."""

from neurograft.cli import main

if __name__ == "__main__":
    main()
