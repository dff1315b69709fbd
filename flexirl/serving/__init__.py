"""OpenAI's interface for both kinds of request: immediate ones answered at once, deferred ones as files and batches."""

import logging

logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
