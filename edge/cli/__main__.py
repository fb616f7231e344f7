"""`python -m edge.cli`: the same as `edge-run`."""

from edge.cli import main

main()
