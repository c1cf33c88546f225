"""The HTTP side: what clients speak to, and the choice of who answers."""
