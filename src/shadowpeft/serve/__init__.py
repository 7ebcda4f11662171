"""Routing between device and cloud, and the two servers. The modules are imported by name; nothing is imported here."""
