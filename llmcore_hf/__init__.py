"""LLM-Core: a Hugging Face alignment library that is also a 14-day interview course.

Importing this package imports nothing heavy: torch and the trainers load when a module runs.
"""

__version__ = "0.1.0"
