"""Side-by-side speed, memory and behaviour; each file but the folder ``comparison`` is a script with its own help."""
