"""The mechanism, compiled: state, queues, KV cache, admission, composition, preemption, books, plan and commit."""
