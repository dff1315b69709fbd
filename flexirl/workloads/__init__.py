"""What arrives: arrival processes, length models, trace readers and the scenarios made of them."""
