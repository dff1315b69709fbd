"""How policies are learned: agents, algorithms, export."""
