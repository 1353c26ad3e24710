"""Bridges to other packages. Nothing here is imported by `import moe_ops`; import the bridge you need by name."""
