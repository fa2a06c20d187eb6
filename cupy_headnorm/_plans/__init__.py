"""For each kernel its geometry, macros and parameters: one file for each ``.cu``."""
