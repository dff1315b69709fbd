"""OpenAI's interface for both kinds of request: immediate ones answered at once, deferred ones as files and batches."""
