"""FlexiRL learns the admission and preemption policy of an LLM serving engine.

Importing it registers the Gymnasium environments `flexirl/Batching-v0` and `flexirl/LiveBatching-v0`.
"""

import gymnasium

__version__ = "0.1.0"

gymnasium.register(
    id="flexirl/Batching-v0",
    entry_point="flexirl.experiments.configuration:make_batching_env",
    vector_entry_point="flexirl.experiments.configuration:make_vector_env",
)
gymnasium.register(id="flexirl/LiveBatching-v0", entry_point="flexirl.experiments.configuration:make_live_env")
