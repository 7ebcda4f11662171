"""What the base is: its parts, its head, its weights and its identity."""
