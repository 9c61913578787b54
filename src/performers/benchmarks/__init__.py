"""Measurements on this machine: settings in, figures out, each configuration in a process of its own.

A fresh process per configuration keeps what one leaves behind (allocator pools, compiled kernels, peak memory) out of the
figures of the next.
"""
