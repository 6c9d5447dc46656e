"""Local MoE and EXL3 kernels. Nothing is imported here: other packages of this name exist."""
