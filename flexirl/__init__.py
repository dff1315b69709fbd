"""FlexiRL learns the admission and preemption policy of an LLM serving engine.

Importing it makes the environments `flexirl/Batching-v0` and `flexirl/LiveBatching-v0` known to Gymnasium, at once or
as soon as that is imported: programs that need no Gymnasium do not wait for it.
"""

from flexirl import registration

__version__ = "0.1.0"

registration.install()
