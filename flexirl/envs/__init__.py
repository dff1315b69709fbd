"""Gymnasium and vector environments over the serving engine: observation, action, reward."""
