"""``python -m segray``: the command line."""

from segray.cli import main

main()
