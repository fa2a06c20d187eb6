"""CUDA as it is found: driver, CuPy, NVRTC, loaded functions, memory, launches. Numbers alone."""
