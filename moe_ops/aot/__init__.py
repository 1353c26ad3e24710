"""Kernels compiled ahead of time, for processes that have neither Python nor Triton: `python -m moe_ops aot`.

The backends run as ever, on operands without memory (`recording`) and with a number of tokens that is a symbol
(`counts`); what they launch is written down, compiled (`compiler`) and put into a table (`table`) that the C++ library
reads. So there is one place that chooses tiles and fills in arguments, and C++ has nothing to decide. docs/cpp.md has
the whole picture.
"""
