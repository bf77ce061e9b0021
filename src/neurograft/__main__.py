"""`python -m neurograft`."""

from neurograft.cli import main

main()
