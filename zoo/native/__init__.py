"""Kernels in C++ that are compiled when they are first needed, where a compiler is at hand. Nothing depends on them."""
