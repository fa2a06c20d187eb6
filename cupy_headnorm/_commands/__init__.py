"""The commands of ``python -m cupy_headnorm`` that have no module of their own."""
