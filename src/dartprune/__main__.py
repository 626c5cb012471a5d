"""`python -m dartprune`: the command line."""

from dartprune.cli.main import main

main()
