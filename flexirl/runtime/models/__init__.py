"""Models: any decoder of Transformers in a local folder, run with paged attention."""
