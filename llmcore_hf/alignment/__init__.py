"""Alignment methods on TRL's trainers. One file is one module."""
