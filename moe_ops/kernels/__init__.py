"""Device code only: Triton and Gluon kernels. Nothing here launches anything or knows about torch."""
