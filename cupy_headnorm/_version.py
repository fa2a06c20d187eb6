"""The version of the package, read by setup.cfg and by ``cupy_headnorm.__version__``."""

__version__ = "0.1.0"
