"""`python -m zerompi`."""

from zerompi.cli import main

main()
