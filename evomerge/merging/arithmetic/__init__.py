"""Passes over weights and other arithmetic of tensors: plain definitions, and what is compiled for them."""
