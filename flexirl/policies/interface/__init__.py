"""What passes between an engine of any kind and a policy: the view, the observation, the action, the Decision."""
