"""What runs the ops: plain torch, the C++ kernels, the CUDA kernels, the Triton kernels."""
