"""Mask R-CNN's design space as tensors: backbones, RPN, RoI operations, heads, losses. No I/O."""
