"""Making the shadow backbone of an adapter."""
