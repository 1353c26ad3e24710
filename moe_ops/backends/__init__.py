"""Backends: workspace, descriptors, grids and launches. What runs was decided in `moe_ops.dispatch`."""
