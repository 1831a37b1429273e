"""`python -m convmae` is the command `convmae`; torchrun needs this form."""

from convmae.cli import main

main()
