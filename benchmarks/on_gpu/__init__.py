"""What benchmarks/gpu.py runs on a machine with a GPU: checks, measurements, floors and figures."""
