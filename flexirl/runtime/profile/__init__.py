"""What an engine is as figures: its limits, its step-time model, its capacity and pace."""
