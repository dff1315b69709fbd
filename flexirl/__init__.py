"""FlexiRL learns the admission and preemption policy of an LLM serving engine."""

__version__ = "0.1.0"
