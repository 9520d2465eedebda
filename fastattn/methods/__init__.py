"""Attention methods, one file each: public functions on top of the fused ops."""
