"""Kernels for the CPU, in C++, compiled once per instruction set and chosen when the process starts."""
