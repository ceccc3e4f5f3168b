"""The Triton kernels of vgkern. They import triton and torch only and know nothing of the package around them."""
